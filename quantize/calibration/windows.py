"""Windows of activations through a layer, in shards of a fixed size, which can be computed side by side.

Sums over windows are summed within each shard, and then over the shards in their order. Both are the same however many machines
compute: so are the integers, bit for bit. `Each` is the one place where a calibration meets what spreads its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gemma_edge.model.checkpoint import Weights
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gemma import layer_rope
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.quantize.checkpoint.kv_scales import KVRanges

SHARD = 4  # windows of a shard
Job = TypeVar("Job")
Done = TypeVar("Done")
Run = Callable[[nn.Module, Tensor], Tensor]  # applies a block to one window: (1, T, hidden) -> (1, T, hidden)


class Each(Protocol):
    """Applies a function to jobs that do not depend on each other; gives the results in the order of the jobs."""

    def __call__(self, function: Callable[[Job], Done], jobs: Iterable[Job], /) -> Iterable[Done]:
        """Function and jobs can be pickled."""
        ...


def in_turn(function: Callable[[Job], Done], jobs: Iterable[Job], /) -> Iterator[Done]:
    """One job after the other, here. A job is taken when the one before is done, so that its memory is free."""
    return map(function, jobs)


@dataclass(frozen=True)
class LayerRun:
    """Applies a layer to one window (1, T, hidden) from position 0."""

    config: GemmaConfig
    layer: int
    tokens: int
    rope: Any

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """The layer's output."""
        return self.with_cache(block, x)[0]

    def with_cache(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, and the keys and values that its cache then holds: (1, K, T, D) each."""
        cache = RingCache(self.config, context=self.tokens, chunk=self.tokens, layers=[self.layer])
        out: Tensor = block(x, cache, self.rope, torch.zeros(1, dtype=torch.int64))
        k, v = (cache.get_buffer(f"{kind}_{self.layer}")[:, :, : self.tokens] for kind in "kv")
        return out, k, v


def runner(source: Weights, layer: int, tokens: int) -> LayerRun:
    """What applies a layer to windows of so many tokens."""
    rope = layer_rope(source.config, layer, torch.zeros(1, dtype=torch.int64), tokens)
    return LayerRun(source.config, layer, tokens, rope)


def shards(x: Tensor) -> Iterator[Tensor]:
    """Windows (N, T, hidden) in parts of SHARD, the last one of fewer; copies, as a view is pickled with all that it views."""
    return (part.clone() for part in _views(x))


def _views(x: Tensor) -> list[Tensor]:
    return [x[start : start + SHARD] for start in range(0, len(x), SHARD)]


def advance(block: nn.Module, x: Tensor, run: Run, each: Each = in_turn) -> None:
    """Apply a block to every window of (N, T, hidden), in place."""
    for part, out in zip(_views(x), each(partial(_outputs, block, run), shards(x)), strict=True):
        part.copy_(out)


def advance_with_ranges(block: nn.Module, x: Tensor, run: LayerRun, ranges: KVRanges, each: Each = in_turn) -> None:
    """`advance`, and `ranges` is given the keys and values."""
    for part, (out, seen) in zip(_views(x), each(partial(_outputs_and_ranges, block, run), shards(x)), strict=True):
        part.copy_(out)
        ranges.merge(seen)


@torch.no_grad()
def _outputs(block: nn.Module, run: Run, x: Tensor) -> Tensor:
    return torch.cat([run(block, x[i : i + 1]) for i in range(len(x))])


@torch.no_grad()
def _outputs_and_ranges(block: nn.Module, run: LayerRun, x: Tensor) -> tuple[Tensor, KVRanges]:
    ranges, outputs = KVRanges(), []
    for i in range(len(x)):
        out, k, v = run.with_cache(block, x[i : i + 1])
        ranges.add(run.layer, k, v)
        outputs.append(out)
    return torch.cat(outputs), ranges
