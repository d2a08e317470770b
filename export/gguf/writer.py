"""Writes a quantized checkpoint as a GGUF file: the same integers in llama.cpp's blocks of 32.

A block holds one scale in float16 and 32 integers. A scale of a larger group, or of a whole channel, is repeated in each of its
blocks: so a group of 128 takes 4.5 bits per weight here. Our scales are bfloat16, which float16 holds exactly between 7.6e-6 and
65504; what it does not is counted. Source: ggml-common.h in the ggml repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gemma_edge.bundle.manifest import MANIFEST, Manifest, check_hashes
from gemma_edge.errors import InputError
from gemma_edge.export.gate.again import read_back
from gemma_edge.export.gguf.metadata import architecture_of, model_metadata
from gemma_edge.export.gguf.vocabulary import text_metadata
from gemma_edge.files import replacing
from gemma_edge.model.checkpoint import FLOATS, Weights, norm_names, row_slices, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gguf.reader import package
from gemma_edge.model.gguf.tensors import INTEGERS, OTHERS, block_names
from gemma_edge.model.quantized import QuantizedTensor
from gemma_edge.progress import Progress, no_progress
from gemma_edge.quantize.checkpoint.store import open_weights
from gemma_edge.reading import present
from gemma_edge.text.tokenizer import TOKENIZER_FILE

BLOCK = 32  # weights
KINDS = {config.bits: kind for kind, (_, config) in INTEGERS.items()}  # all of them have blocks of BLOCK
KINDS_OF_FLOATS = {dtype: kind for kind, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Written:
    """What became of the weights."""

    types: dict[str, int]  # llama.cpp's type -> how many matrices
    rounded_scales: int  # scales that float16 does not hold exactly
    largest_error: float  # of them, relative

    def __str__(self) -> str:
        """One line for people."""
        kinds = ", ".join(f"{kind} x {count}" for kind, count in self.types.items())
        if not self.rounded_scales:
            return f"{kinds}; the same integers and scales"
        return f"{kinds}; the same integers, {self.rounded_scales} scales rounded by {self.largest_error:.2%} at most"


@dataclass(frozen=True)
class _Part:
    """One tensor of the file."""

    name: str  # llama.cpp's
    source: str  # ours; of a norm with its ending
    kind: str
    shape: tuple[int, ...]


def open_integers(folder: Path) -> Weights:
    """The weights of a bundle, or of a quantized checkpoint.

    Raises:
        InputError: it is neither, or a bundle of backends that do not give their integers back.
    """
    if not present(folder / MANIFEST):
        return open_weights(folder)
    manifest = Manifest.load(folder)
    check_hashes(folder, manifest)
    return read_back(folder, manifest, "pass the checkpoint that --save-checkpoint kept")


def write_gguf(source: Weights, path: Path, *, force: bool = False, progress: Progress = no_progress) -> Written:
    """Write the file; it appears complete or not at all.

    Args:
        source: what it leaves float stays float.
        path: the file.
        force: replace an existing file.
        progress: shows a bar.

    Raises:
        InputError: llama.cpp cannot run such a model, the gguf package is missing, or the file exists or cannot be written.
    """
    gguf = package()
    if path.exists() and not force:
        raise InputError(f"{path} exists; pass `force` to replace it, or `out` for another file")
    metadata = model_metadata(source.config) | _text(source)
    parts = list(_parts(source))
    loss = _Loss()
    try:
        with replacing(path) as partial:
            _write_header(gguf, partial, source.config, metadata, parts)
            with partial.open("ab") as file, progress("write", len(parts), False) as advance:
                _pad(file, gguf.GGUF_DEFAULT_ALIGNMENT)
                for part in parts:
                    for data in _data(source, part, loss):
                        file.write(data)
                    _pad(file, gguf.GGUF_DEFAULT_ALIGNMENT)
                    advance(1)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; pass `out` for another place") from None
    kinds = [part.kind for part in parts if len(part.shape) == 2]
    return Written({kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}, loss.rounded, loss.largest)


def _text(source: Weights) -> dict[str, Any]:
    if not present(source.text_folder / TOKENIZER_FILE):
        raise InputError(f"{source.text_folder} has no {TOKENIZER_FILE}, without which llama.cpp runs no text")
    return text_metadata(source.text_folder, source.config)


def _parts(source: Weights) -> Iterator[_Part]:
    """Every tensor, norms last."""
    names = {ours.removesuffix(".weight"): llama for llama, ours in OTHERS.items()}
    blocks = {ours: llama for llama, ours in block_names(source.config.norms).items()}

    def llama(name: str) -> str:
        if name in names:
            return names[name]
        layer, part = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{blocks[part]}.weight"

    for name, shape in weight_shapes(source.config).items():
        config = source.configs[name]
        kind = KINDS[config.bits] if config else KINDS_OF_FLOATS[source.dtype(name)]
        if config and shape[1] % BLOCK:
            raise InputError(f"{name} has rows of {shape[1]}, which do not divide into llama.cpp's blocks of {BLOCK}")
        yield _Part(llama(name), name, kind, shape)
    for name in norm_names(source.config):
        yield _Part(llama(name.removesuffix(".weight")), name, "F32", tuple(source.vector(name).shape))


def _write_header(gguf: Any, path: Path, config: GemmaConfig, metadata: dict[str, Any], parts: list[_Part]) -> None:
    with ExitStack() as stack:
        writer = gguf.GGUFWriter(path, architecture_of(config))
        stack.callback(writer.close)
        for key, value in metadata.items():
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_array)(key, value)
        for part in parts:
            kind = gguf.GGMLQuantizationType[part.kind]
            weights, size = gguf.GGML_QUANT_SIZES[kind]
            count = int(np.prod(part.shape)) // weights * size
            writer.add_tensor_info(part.name, part.shape, np.dtype(np.float32), count, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


class _Loss:
    """What float16 makes of scales."""

    rounded = 0
    largest = 0.0

    def add(self, scale: Tensor, rounded: Tensor) -> None:
        """Count scales (rows, groups) that were rounded."""
        error = ((rounded.float() - scale.float()) / scale.float()).abs()
        self.rounded += int((error > 0).sum())
        self.largest = max(self.largest, float(error.max()))


def _data(source: Weights, part: _Part, loss: _Loss) -> Iterator[bytes]:
    """A tensor's bytes, some rows at a time."""
    if len(part.shape) == 1:
        yield (source.vector(part.source).float() + 1).numpy().tobytes()  # llama.cpp keeps 1 + w
        return
    rows, columns = part.shape
    for start, stop in row_slices((rows, columns)):
        if part.kind in KINDS.values():
            yield _blocks(source.quantized(part.source, start, stop), part.source, loss).numpy().tobytes()
        else:
            values = source.rows(part.source, start, stop).to(source.dtype(part.source)).contiguous()
            yield values.view(torch.uint8).numpy().tobytes()


def _blocks(given: QuantizedTensor, name: str, loss: _Loss) -> Tensor:
    """Rows as blocks: (rows * blocks, bytes of a block) uint8.

    Raises:
        InputError: float16 cannot hold a scale.
    """
    rounded = given.scale.to(torch.float16)
    if not (rounded.isfinite() & (rounded != 0)).all():
        raise InputError(f"{name} has a scale that float16, llama.cpp's type of scales, cannot hold")
    loss.add(given.scale, rounded)
    rows, columns = given.codes.shape
    blocks = columns // BLOCK
    scale = rounded.repeat_interleave(blocks // rounded.shape[1], 1).reshape(-1, 1).view(torch.uint8)
    codes = given.codes.view(rows * blocks, BLOCK)
    if given.config.bits == 4:  # the first half of a block in the low nibbles, the second in the high ones
        low, high = (codes + 8).view(torch.uint8).chunk(2, 1)
        return torch.cat((scale, low | (high << 4)), 1)
    return torch.cat((scale, codes.view(torch.uint8)), 1)
