"""Contenders of quality.py on a Gemma: the tool itself, from the folder to the table's integers, and llama.cpp's own files."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from quality_child import LINEAR
from quality_judge import Made
from quality_ours import Bar, Contender
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from gemma_edge import user_cache
from gemma_edge.model.checkpoint import norm_names, row_slices, weight_shapes
from gemma_edge.model.families import GEMMA3
from gemma_edge.model.gguf.tensors import GgufFile
from gemma_edge.progress import no_progress
from gemma_edge.quantize.api import Quantization, choose_recipe, make_checkpoint
from gemma_edge.quantize.calibration.layerwise import Calibration
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import QUALITIES

sys.path.insert(0, str(Path(__file__).parents[1]))
from gemma3_270m import FILE
from peers import LlamaCpp

TABLE = "model.embed_tokens.weight"


def by_the_tool(model: PreTrainedModel, windows: Tensor, *, options: QuantizeOptions) -> Made:
    """Give the model the weights of the checkpoint that `gemma-export quantize` makes, with these calibration windows."""
    source = open_weights(Path(str(model.name_or_path)))
    quality = QUALITIES[options.quality or "fast"]
    calibration = Calibration(windows, quality.rounds, quality.refit) if quality.tokens else None
    source, recipe, _ = choose_recipe(options, source, None, no_progress)
    work = Quantization(options, source, recipe, calibration)
    with tempfile.TemporaryDirectory() as place:
        # an empty cache: the CPU seconds of a run before would be missing
        os.environ[user_cache.VARIABLE] = place
        start = time.process_time()
        quantized, _ = make_checkpoint(work, Path(place, "checkpoint"), no_progress, [])
        cpu_s = time.process_time() - start
        _put(model, quantized)
    return Made(cpu_s, *_bits(quantized))


def _put(model: PreTrainedModel, quantized: QuantizedCheckpoint) -> None:
    for name, shape in weight_shapes(quantized.config).items():
        weight = model.get_parameter(f"{name}.weight")
        for start, stop in row_slices(shape):
            weight[start:stop] = quantized.rows(name, start, stop)
    for name in norm_names(quantized.config):
        model.get_parameter(name).copy_(quantized.vector(name))


def _bits(quantized: QuantizedCheckpoint) -> tuple[float, float]:
    """Bits per weight of the linears and of the table, scales included."""
    stored = {}
    for name, shape in weight_shapes(quantized.config).items():
        config = quantized.configs[name]
        assert config is not None, "every matrix becomes integers here"
        stored[f"{name}.weight"] = config.stored_bytes(*shape), shape[0] * shape[1]
    return _bits_per_weight(stored)


def _bits_per_weight(stored: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """Bits per weight of all linears together, and of the table, from each matrix's bytes and number of weights."""
    linears = [sizes for name, sizes in stored.items() if LINEAR.fullmatch(name)]
    table_bytes, table_weights = stored[TABLE]
    return 8 * sum(size for size, _ in linears) / sum(count for _, count in linears), 8 * table_bytes / table_weights


def by_llama_cpp(model: PreTrainedModel, windows: Tensor, *, peer: LlamaCpp, kind: str, imatrix: bool) -> Made:
    """Give the model the weights of a file that llama-quantize makes, dequantized by llama.cpp's Python package."""
    folder = Path(str(model.name_or_path))
    source, used = folder.parent / FILE, resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as place:
        extra: list[str] = []
        if imatrix:
            text, matrix = Path(place, "text"), Path(place, "imatrix.gguf")
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            text.write_text("\n".join(tokenizer.decode(window.tolist()) for window in windows), encoding="utf-8")
            length = str(windows.shape[1])
            _run([peer.imatrix, "-m", source, "-f", text, "-o", matrix, "-c", length, "-b", length, "-ngl", "0"])
            extra = ["--imatrix", str(matrix)]
        out = Path(place, "out.gguf")
        _run([peer.quantize, *extra, source, out, kind, "2"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        file = GgufFile(out, GEMMA3.norms)
        for name in file.tensors:
            model.get_parameter(name).copy_(file.rows(name))
        sizes = {name: (entry.stop - entry.start, math.prod(entry.shape)) for name, entry in file.tensors.items()}
        return Made(cpu_s, *_bits_per_weight(sizes))


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def _ours(quality: str, group_size: int, bits: int = 4, table_bits: int = 8, bar: Bar | None = None) -> Contender:
    options = QuantizeOptions(
        bits=bits,
        group_size=group_size,
        table_bits=table_bits if bits == 4 else None,
        quality=quality if bits == 4 else None,
    )
    return Contender(partial(by_the_tool, options=options), quality != "fast", bar)


OURS = {
    "fast g32": _ours("fast", 32),
    "balanced g32": _ours("balanced", 32),
    "balanced g128": _ours("balanced", 128),
    "best g32": _ours("best", 32, bar=Bar(0.6)),
    "best g32, table 4": _ours("best", 32, table_bits=4),
    "best g128": _ours("best", 128, bar=Bar(1.0)),
    "best channel": _ours("best", 0),
    "int8 channel": _ours("fast", 0, bits=8),
}
FILES = {
    "llama.cpp Q4_0": ("Q4_0", False),
    "llama.cpp Q4_0, imatrix": ("Q4_0", True),
    "llama.cpp Q4_K_M": ("Q4_K_M", False),
    "llama.cpp Q4_K_M, imatrix": ("Q4_K_M", True),
    "llama.cpp IQ4_XS": ("IQ4_XS", False),
    "llama.cpp IQ4_XS, imatrix": ("IQ4_XS", True),
    "llama.cpp Q8_0": ("Q8_0", False),
}


def contenders(peers: Path | None) -> dict[str, Contender]:
    """Ours, and llama.cpp's if it is installed below `peers`."""
    if peers is None or not LlamaCpp(peers).ready:
        return OURS
    files = {
        name: Contender(partial(by_llama_cpp, peer=LlamaCpp(peers), kind=kind, imatrix=imatrix), imatrix, peer=True)
        for name, (kind, imatrix) in FILES.items()
    }
    return files | OURS
