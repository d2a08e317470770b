"""The tensors of a GGUF file by their names in a Hugging Face folder, as float: what safetensors_reader.py is for safetensors.

A quantized tensor is dequantized row by row when it is read, so memory holds the rows asked for and no more. The integers of
the types that are plain integers with a scale can be read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.families import BlockNorms
from gemma_edge.model.gguf.reader import FLOAT_TYPES, HINT, Header, Place, file_status, opened, package, read_header
from gemma_edge.model.quantized import QuantConfig, QuantizedTensor
from gemma_edge.model.safetensors_reader import DTYPES, Entry

Bytes = np.ndarray[tuple[int, int], np.dtype[np.uint8]]

# NAMES: llama.cpp's names of a block's parts -> Hugging Face's; NORMS: of its norms -> fields of BlockNorms; OTHERS: of other
# tensors -> Hugging Face's. Source: gguf/tensor_mapping.py.
BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(\w+)\.weight")
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "attn_norm": "before_attention",
    "post_attention_norm": "after_attention",
    "ffn_norm": "before_mlp",
    "post_ffw_norm": "after_mlp",
}
OTHERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# IMAGES: what the names of an image encoder's tensors begin with, where a file holds one -> Hugging Face's
IMAGES = {"v.": "vision_tower.", "mm.": "multi_modal_projector."}
# INTEGERS: types whose blocks are a float16 scale and integers without a zero point -> how the quantizer calls such integers
INTEGERS = {"Q4_0": ("q4_0", QuantConfig(4, 32)), "Q8_0": ("rtn", QuantConfig(8, 32))}
SCALE_BYTES = 2


def block_names(norms: BlockNorms) -> dict[str, str]:
    """Hugging Face's names of a block's parts, by llama.cpp's."""
    found = {name: getattr(norms, place) for name, place in NORMS.items()}
    return NAMES | {name: norm for name, norm in found.items() if norm is not None}


def hf_name(name: str, parts: Mapping[str, str]) -> str:
    """A tensor's name in a Hugging Face folder; a name that the model does not have stays as it is, and is refused later."""
    for prefix, hf in IMAGES.items():
        if name.startswith(prefix):
            return hf + name.removeprefix(prefix)
    block = BLOCK.fullmatch(name)
    if block and block[2] in parts:
        return f"model.layers.{int(block[1])}.{parts[block[2]]}.weight"
    return OTHERS.get(name, name)


class GgufFile:
    """A file by its path. Like a SafetensorsFile, it has tensors by name and gives rows of them."""

    def __init__(self, path: Path, norms: BlockNorms) -> None:
        """Read the header.

        Args:
            path: the file; of a split one, any part.
            norms: the family's, which only the first part names.

        Raises:
            InputError: as `read_header`.
        """
        self.path = path
        self._header: Header = read_header(path)
        parts = block_names(norms)
        self._places = {hf_name(name, parts): place for name, place in self._header.tensors.items()}
        if len(self._places) != len(self._header.tensors):
            raise InputError(f"{path} holds a tensor under two names", hint=HINT)

    @cached_property
    def tensors(self) -> Mapping[str, Entry]:
        """By name, with the type in which `rows` gives them."""
        return {name: Entry(_dtype(name, p), p.shape, p.start, p.stop) for name, p in self._places.items()}

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` along the first axis of a tensor in the type that `tensors` names, in memory of their own.

        Raises:
            InputError: the file was changed since its header was read.
        """
        place, dtype = self._places[name], DTYPES[self.tensors[name].dtype]
        first, last, _ = slice(start, stop).indices(place.shape[0])
        if len(place.shape) == 1:
            values = _floats(self._rows(place, 0, 1), place.type)[0, first:last]
        else:
            values = _floats(self._rows(place, first, last), place.type).reshape(last - first, *place.shape[1:])
        # llama.cpp keeps 1 + w
        return (values.float() - 1 if _is_norm(name) else values).to(dtype)

    def type(self, name: str) -> str:
        """A tensor's type in the file."""
        return self._places[name].type

    def quantized(self, name: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of a matrix whose type is one of INTEGERS, as they are stored. Raises as `rows` does."""
        place = self._places[name]
        _, config = INTEGERS[place.type]
        blocks = self._rows(place, start, stop).reshape(stop - start, -1, SCALE_BYTES + 32 * config.bits // 8)
        scale = torch.from_numpy(blocks[:, :, :SCALE_BYTES].copy()).view(torch.float16).flatten(1)  # (rows, groups)
        codes = torch.from_numpy(blocks[:, :, SCALE_BYTES:].copy())  # (rows, groups, bytes)
        if config.bits == 4:  # the first half of a block in the low nibbles, the second in the high ones
            codes = torch.cat((codes & 15, codes >> 4), dim=2).to(torch.int8) - 8
        return QuantizedTensor(codes.view(torch.int8).flatten(1), scale, config)

    def _rows(self, place: Place, start: int, stop: int) -> Bytes:
        """The bytes of some rows along the first axis, a line for each row along the last one; a vector is one row."""
        rows = place.shape[0] if len(place.shape) > 1 else 1
        size = (place.stop - place.start) // rows
        return self._bytes(place, start * size, stop * size).reshape(-1, place.row_bytes)

    def _bytes(self, place: Place, begin: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """A part of a tensor's bytes."""
        out = np.empty(end - begin, np.uint8)
        with opened(self.path) as file:
            if file_status(file) != self._header.status:
                raise InputError(f"{self.path} was changed while it was read", hint="export again")
            file.seek(place.start + begin)
            if file.readinto(out.data) != len(out):
                raise ValueError("it ends early")
        return out


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _dtype(name: str, place: Place) -> str:
    return place.type if place.type in FLOAT_TYPES and not _is_norm(name) else "F32"


def _floats(stored: Bytes, kind: str) -> Tensor:
    """Values of whole rows of bytes."""
    if kind in FLOAT_TYPES:
        return torch.from_numpy(stored).view(DTYPES[kind])
    gguf = package()
    with np.errstate(all="ignore"):  # damaged scales become NaN or infinite, which the reader of the weights refuses
        values = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
