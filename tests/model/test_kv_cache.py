"""The ring against a plain dictionary that remembers which position was written to which slot last."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.bundle.geometry import slots_needed
from gemma_edge.errors import InputError
from gemma_edge.model.config import GEMMA2_2B
from gemma_edge.model.kv_cache import RingCache, Rope, visible

CONFIG = replace(
    GEMMA2_2B,
    num_hidden_layers=3,
    layer_types=(LOCAL, GLOBAL, LOCAL),
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    sliding_window=6,
)
BOUNDS = [(1, 1), (1, 5), (4, 1), (8, 3), (8, 8), (3, 8), (17, 7)]  # window, longest chunk


def chunks(total: int, longest: int, start: int = 0) -> Iterator[Tensor]:
    """Positions of a sequence in chunks of random lengths; the longest one comes up, too."""
    lengths = random.Random(total)
    at = start
    while at < start + total:
        size = longest if at == start else lengths.randint(1, longest)
        yield torch.arange(at, at + size)
        at += size


def wanted(position: int, window: int) -> set[int]:
    return set(range(max(0, position - window + 1), position + 1))


def seen(mask: Tensor, held: dict[int, int], query: int) -> set[int]:
    """The positions that one query of a chunk sees; a slot never written counts as position -1."""
    return {held.get(slot, -1) for slot in torch.nonzero(mask[query]).flatten().tolist()}


def write(held: dict[int, int], positions: Tensor, slots: int) -> None:
    for position in positions.tolist():
        held[position % slots] = position


@pytest.mark.parametrize(("window", "chunk"), BOUNDS)
@pytest.mark.parametrize("spare", [0, 1, 9])
def test_each_query_sees_exactly_its_window(window: int, chunk: int, spare: int) -> None:
    slots = slots_needed(window, chunk) + spare
    held: dict[int, int] = {}
    for positions in chunks(6 * slots, chunk):
        write(held, positions, slots)
        mask = visible(positions, slots, window)
        assert mask.shape == (len(positions), slots)
        for query, position in enumerate(positions.tolist()):
            assert seen(mask, held, query) == wanted(position, window)


@pytest.mark.parametrize(("window", "chunk"), BOUNDS[1:])
def test_one_slot_fewer_loses_a_key_that_is_needed(window: int, chunk: int) -> None:
    """So `slots_needed` is the smallest number, not only a sufficient one."""
    slots = slots_needed(window, chunk) - 1
    held: dict[int, int] = {}
    for start in range(0, 4 * slots * chunk, chunk):  # only the longest chunk needs every slot
        positions = torch.arange(start, start + chunk)
        write(held, positions, slots)
    assert seen(visible(positions, slots, window), held, 0) != wanted(start, window)


@pytest.mark.parametrize("start", [10**6, 2**31 - 3, 2**40])
def test_positions_far_beyond_any_table_are_kept_apart(start: int) -> None:
    window, chunk = 8, 5
    slots = slots_needed(window, chunk)
    held: dict[int, int] = {}
    write(held, torch.arange(start - slots, start), slots)
    for positions in chunks(3 * slots, chunk, start):
        write(held, positions, slots)
        mask = visible(positions, slots, window)
        for query, position in enumerate(positions.tolist()):
            assert seen(mask, held, query) == wanted(position, window)


def attend(cache: RingCache, layer: int, count: int, start: int = 0) -> Tensor:
    """One call with random vectors and no rotation."""
    c = CONFIG
    wide, narrow = (1, count, c.num_attention_heads * c.head_dim), (1, count, c.num_key_value_heads * c.head_dim)
    rope = Rope(torch.ones(count, c.head_dim // 2), torch.zeros(count, c.head_dim // 2))
    draw = torch.Generator().manual_seed(start)
    q, k, v = (torch.randn(shape, generator=draw) for shape in (wide, narrow, narrow))
    return cache.attend(layer, q, k, v, rope, torch.tensor([start]))


@pytest.mark.parametrize("layer", [0, 1])
def test_ring_rejects_chunk_wider_than_its_slack(layer: int) -> None:
    cache = RingCache(CONFIG, context=10, chunk=4)
    attend(cache, layer, 4)
    with pytest.raises(AssertionError, match="chunk of 5 tokens exceeds 4"):
        attend(cache, layer, 5, start=4)


def test_local_layers_hold_the_window_and_global_layers_the_context() -> None:
    cache = RingCache(CONFIG, context=10, chunk=4)
    slots = {name: buffer.shape[2] for name, buffer in cache.named_buffers()}
    assert slots == {"k_0": 9, "v_0": 9, "k_1": 13, "v_1": 13, "k_2": 9, "v_2": 9}  # 6 + 4 - 1 and 10 + 4 - 1


def test_a_context_shorter_than_the_window_narrows_the_local_layers() -> None:
    cache = RingCache(CONFIG, context=3, chunk=2)
    assert cache.windows == [3, 3, 3]


def test_one_layer_can_be_held_alone() -> None:
    cache = RingCache(CONFIG, context=10, chunk=4, layers=[1])
    assert {name for name, _ in cache.named_buffers()} == {"k_1", "v_1"}
    attend(cache, 1, 4)


def test_memory_does_not_grow_with_the_tokens() -> None:
    cache = RingCache(CONFIG, context=10, chunk=4)
    before = {name: (buffer.data_ptr(), buffer.nbytes) for name, buffer in cache.named_buffers()}
    for start in range(0, 200, 4):
        for layer in range(3):
            attend(cache, layer, 4, start)
    assert {name: (buffer.data_ptr(), buffer.nbytes) for name, buffer in cache.named_buffers()} == before


def test_slots_that_were_never_written_have_no_weight() -> None:
    """An empty slot holds zeros, which softmax would count as a key like any other: the first token must get its own value."""
    cache = RingCache(CONFIG, context=10, chunk=4)
    found = attend(cache, 1, 1)  # (1, 1, H*D)
    value = cache.get_buffer("v_1")[0, 0, 0]  # (D,)
    assert_close(found.view(2, 4), value.expand(2, 4), rtol=0.0, atol=0.0)  # its weight is 1 exactly


@pytest.mark.parametrize(("context", "chunk"), [(0, 1), (-1, 4), (8, 0)])
def test_an_empty_ring_is_refused(context: int, chunk: int) -> None:
    with pytest.raises(InputError, match=f"context {context} and chunk {chunk} must be at least 1"):
        RingCache(CONFIG, context=context, chunk=chunk)
