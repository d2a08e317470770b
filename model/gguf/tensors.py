"""The tensors of a GGUF file by their names in a Hugging Face folder, as float: what safetensors_reader.py is for safetensors.

A quantized tensor is dequantized row by row when it is read, so memory holds the rows asked for and no more.
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
from gemma_edge.model.safetensors_reader import DTYPES, Entry

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


def block_names(norms: BlockNorms) -> dict[str, str]:
    """Hugging Face's names of a block's parts, by llama.cpp's."""
    found = {name: getattr(norms, place) for name, place in NORMS.items()}
    return NAMES | {name: norm for name, norm in found.items() if norm is not None}


def hf_name(name: str, parts: Mapping[str, str]) -> str:
    """A tensor's name in a Hugging Face folder; a name that the model does not have stays as it is, and is refused later."""
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
        whole = place.shape if len(place.shape) > 1 else (1, *place.shape)
        first, last, _ = slice(start, stop).indices(place.shape[0])
        part = (first, last) if len(place.shape) > 1 else (0, 1)
        stored = self._bytes(place, *(row * (place.stop - place.start) // whole[0] for row in part))
        values = _floats(stored.reshape(-1, place.row_bytes), place.type)
        values = values.reshape(part[1] - part[0], *whole[1:])
        if len(place.shape) == 1:
            values = values[0, first:last]
        # llama.cpp keeps 1 + w
        return (values.float() - 1 if _is_norm(name) else values).to(dtype)

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


def _floats(stored: np.ndarray[tuple[int, int], np.dtype[np.uint8]], kind: str) -> Tensor:
    """Values of whole rows of bytes."""
    if kind in FLOAT_TYPES:
        return torch.from_numpy(stored).view(DTYPES[kind])
    gguf = package()
    with np.errstate(all="ignore"):  # damaged scales become NaN or infinite, which the reader of the weights refuses
        values = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
