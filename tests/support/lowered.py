"""Bundles of one backend without the pipeline around them, and texts to feed them; of no backend in particular."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gemma_edge.bundle.accelerators import Accelerator
from gemma_edge.export.backend import Backend, LoweringTask
from gemma_edge.export.plan import geometry
from gemma_edge.quantize.checkpoint.split_table import split_where_needed
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import Recipe
from gemma_edge.runtimes.engines.base import Runtime
from support.checkpoints import write_manifest


def lower_bundle(
    backend: Backend,
    folder: Path,
    out: Path,
    recipe: Recipe,
    context: int,
    chunk: int,
    *,
    accelerator: Accelerator = "cpu",
    pinned: int = 0,
) -> tuple[QuantizedCheckpoint, Path]:
    """Quantize, lower and check a checkpoint for a backend; the bundle lies in `out`."""
    source = split_where_needed(open_weights(folder), recipe)
    quantized = write_quantized(source, recipe, out / "checkpoint")
    bundle = out / "bundle"
    bundle.mkdir()
    cache = geometry(source.config, context, chunk, pinned=pinned, backend=backend.name, accelerator=accelerator)
    task = LoweringTask(quantized, cache, bundle, recipe.float_bits)
    settings = backend.lower(task)
    backend.check(task)
    write_manifest(bundle, source.config, recipe, cache, {backend.name: settings}, accelerator=accelerator)
    return quantized, bundle


def some_ids(count: int, vocab_size: int) -> list[int]:
    """Random tokens, always the same."""
    return [int(token) for token in np.random.default_rng(0).integers(3, vocab_size, count)]


def prefilled(runtime: Runtime, ids: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits after each chunk."""
    ends = np.cumsum(chunks)
    rows = [runtime.prefill(ids[end - size : end]) for end, size in zip(ends, chunks, strict=True)]
    return torch.from_numpy(np.stack(rows))
