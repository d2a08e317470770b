"""The composed program against the same graph lowered as a whole by the library, and against torchao's eager kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint, relative_error, write_manifest
from torch import Tensor, nn

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'gemma-edge[executorch]'")

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch

import gemma_edge
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.export.backend import LoweringTask
from gemma_edge.export.executorch import lowering
from gemma_edge.export.executorch.backend import BACKEND
from gemma_edge.export.executorch.compose import Composed, Embedding
from gemma_edge.export.executorch.packing import Weight, halves, is_halved, packed_embedding
from gemma_edge.export.executorch.seams import DECOMPOSITIONS, AttendHalf, Half, ProjectHalf, block_half, head_piece
from gemma_edge.export.executorch.templates import COMPILE
from gemma_edge.export.plan import geometry
from gemma_edge.model.checkpoint import TABLE
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe

CHUNK = 7
UNEVEN = [7, 3, 1, 7, 2, *[1] * 8]  # 28 tokens: the window of local layers is 8, their ring 14 slots, the context 16


class Whole(nn.Module):
    """A half with its real weights and norms in place of a delegate."""

    def __init__(self, half: Half, checkpoint: QuantizedCheckpoint, prefix: str) -> None:
        super().__init__()
        self.inner = half
        for name, parameter in half.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(checkpoint.vector(prefix + name.removeprefix("block.")))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The half's outputs, as `Lowered` gives them."""
        found = self.inner(*inputs)
        return found if isinstance(found, tuple) else (found,)


@torch.no_grad()
def whole_model(checkpoint: QuantizedCheckpoint, cache: CacheGeometry) -> Composed:
    """The composed module with nothing lowered in it."""
    config, taken = checkpoint.config, dict[str, int]()

    def weight(name: str, rows: int, columns: int) -> Weight:
        if not is_halved(name):
            return checkpoint.quantized(name, 0, rows)
        taken[name] = taken.get(name, -1) + 1  # the halves are asked for in turn
        return halves(checkpoint.quantized(name, 0, 2 * rows), config.head_dim)[taken[name]]

    layers = [
        tuple(
            Whole(block_half(kind, config, layer, weight), checkpoint, f"model.layers.{layer}.")
            for kind in (ProjectHalf, AttendHalf)
        )
        for layer in range(config.num_hidden_layers)
    ]
    embedding = Embedding(config.hidden_size, checkpoint.configs[TABLE])
    table = packed_embedding(checkpoint.quantized(TABLE, 0, config.vocab_size))
    embedding.register_buffer("table", table["codes"].view(torch.int8))
    embedding.register_buffer("scale", table["scale"].contiguous().view(torch.float32).flatten())
    head = [Whole(head_piece(config, weight), checkpoint, "")]
    return Composed(config, cache, embedding, layers, head, every_position=False).eval()  # type: ignore[arg-type]


def lowered_whole(model: Composed, cache: CacheGeometry) -> bytes:
    """What the library makes of it without templates."""
    program = lowering._trace(model, cache.prefill_chunk).run_decompositions(dict(DECOMPOSITIONS))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=COMPILE)
    return bytes(lowering.finish(edge).buffer)


def in_chunks(model: object, ids: list[int], chunks: Sequence[int]) -> Tensor:
    """Logits after each chunk, (chunks, V)."""
    rows, start = [], 0
    for size in chunks:
        inputs = torch.tensor([ids[start : start + size]]), torch.tensor([start])
        out = model(*inputs) if isinstance(model, nn.Module) else model.forward(inputs)[0]  # type: ignore[attr-defined]
        rows.append(out[0, -1].clone())
        start += size
    return torch.stack(rows)


@torch.no_grad()
def test_composed_equals_the_library_lowering_everything_at_once(tmp_path: Path) -> None:
    """A library whose blobs, keys or packing change cannot pass: a wrong integer is far out of these bounds."""
    source = open_weights(make_checkpoint(tmp_path / "source", num_hidden_layers=2))
    checkpoint = write_quantized(source, make_recipe(4, group_size=32, method="rtn"), tmp_path / "checkpoint")
    cache, bundle = geometry(source.config, 16, CHUNK), tmp_path / "bundle"
    bundle.mkdir()
    task = LoweringTask(checkpoint, cache, bundle)
    settings = BACKEND.lower(task)
    BACKEND.check(task)
    write_manifest(bundle, source.config, make_recipe(4), cache, {"executorch": settings})
    runtime = gemma_edge.load(bundle)
    ids = [int(token) for token in np.random.default_rng(0).integers(3, source.config.vocab_size, sum(UNEVEN))]
    ends = np.cumsum(UNEVEN)
    ours = np.stack([runtime.prefill(ids[end - size : end]) for end, size in zip(ends, UNEVEN, strict=True)])

    model = whole_model(checkpoint, cache)
    (tmp_path / "whole.pte").write_bytes(lowered_whole(model, cache))
    program = _load_for_executorch(str(tmp_path / "whole.pte"))
    # The library cuts the whole graph elsewhere, so a product is summed in another order here and there. Where only AVX2 is, an
    # activation of this text is then rounded to the next of its 255 steps.
    assert relative_error(torch.from_numpy(ours), in_chunks(program, ids, UNEVEN)) <= 5e-3
    assert relative_error(torch.from_numpy(ours), in_chunks(whole_model(checkpoint, cache), ids, UNEVEN)) <= 1e-4
