"""What every engine looks like to the code above it: tokens in, logits out, a cache that never grows.

An engine implements `_forward` and `_clear`. Chunking, positions, rewinding and statistics are here; sampling, text and chat are
in generation/ and gemma_edge.text, files of states in state.py.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.accelerators import CPU
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits, scored_at_once
from gemma_edge.runtimes.engines.adapter import Adapter
from gemma_edge.runtimes.engines.state import Layout, State

Buffers = dict[str, NDArray[Any]]  # name -> (..., slots, head_dim), views of the cache itself
MIN_REMEMBERED = 1 << 13  # token ids that are remembered whatever the cache


@dataclass
class Stats:
    """What a runtime has done since it was opened."""

    load_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0  # fed one by one or by `decode_many`, including drafts that were taken back
    decode_s: float = 0.0
    drafted_tokens: int = 0  # guesses of prompt lookup
    accepted_tokens: int = 0  # guesses that were right
    refed_tokens: int = 0  # fed a second time, after a rewind beyond what the cache holds

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0 before the first prompt."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second, without wrong guesses; 0 before the first token."""
        kept = self.decode_tokens - self.drafted_tokens + self.accepted_tokens
        return kept / self.decode_s if self.decode_s else 0.0


class Runtime(ABC):
    """A loaded bundle with one KV cache.

    A backend's engine must have `_forward` and `_clear`. More methods are right for most engines, and can be overridden:
    `_holds`, by an engine whose cache is not a ring as in model/kv_cache.py; `_buffers`, by an engine whose cache can be reached,
    or `_layout`, `_saved_rows` and `_fill` if it can only be copied, without which a state is restored by feeding its tokens
    again; `prepare_decode_many`, by an engine that loads something in between.
    """

    def __init__(self, bundle: Path, manifest: Manifest, cache: CacheGeometry, identity: str) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.cache = cache
        self.adapter: Adapter | None = None  # what `use_adapter` was given
        self.computes_on = CPU  # the accelerator that computes, or what stands in for it
        self.identity = identity  # hash of what a saved state depends on: `state_identity` in bundle/manifest.py
        self.vocab_size = manifest.config.vocab_size
        self.stats = Stats()
        self.pinned = 0  # tokens at the beginning that every later one sees; `pin` sets it
        self._first: list[int] = []  # ids of the first tokens, as many as could be pinned
        self._position = 0
        self._written = 0  # the highest position ever reached with what is in the cache
        self._kept = array("i")  # the remembered ids, up to the position
        self._max_remembered = max(MIN_REMEMBERED, self.reach + cache.context)
        self._at_once = cache.prefill_chunk  # largest number of tokens that `prefill` hands to `_forward`

    @abstractmethod
    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """Run one chunk (T,), 1 <= T <= `_at_once`, at `self.position`; logits (T, V), or (1, V) of the last."""

    @abstractmethod
    def _clear(self) -> None:
        """Let the cache be written from any position on. What is left in it must be finite, and unseen at position 0."""

    def _holds(self, position: int, written: int) -> bool:
        """Whether the cache still has every key that a text needs to go on at `position`.

        This is the answer for a ring, which has position p in slot p mod slots.

        Args:
            position: of the next token.
            written: the highest position written so far.
        """
        return all(
            max(0, position - layer.window + 1 - layer.pinned) >= written - layer.slots for layer in self.cache.layers
        )

    def _buffers(self) -> Buffers:
        """The cache itself, not a copy: arrays (..., slots, head_dim). At most their first `_written` rows are in use.

        {} if it cannot be reached.
        """
        return {}

    def _layout(self, written: int) -> Layout:
        """Shapes and types of the rows of the cache that are in use after `written` positions; {} if it cannot be reached."""
        return {name: (buffer[..., :written, :].shape, buffer.dtype) for name, buffer in self._buffers().items()}

    def _saved_rows(self) -> Buffers:
        """Copies of the rows in use."""
        return {name: buffer[..., : self._written, :].copy() for name, buffer in self._buffers().items()}

    def _fill(self, rows: Mapping[str, NDArray[Any]]) -> None:
        """Put rows, as `_layout` has them, at the beginning of the cache's buffers."""
        for name, buffer in self._buffers().items():
            buffer[..., : rows[name].shape[-2], :] = rows[name]

    def prepare_decode_many(self) -> None:  # noqa: B027 (most engines need not do anything)
        """Have `decode` and `decode_many` alternate from now on without a graph or program being loaded in between."""

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Compute with an adapter from now on, or with none. Another one than before begins at position 0.

        Raises:
            InputError: this backend takes none, or it belongs to another bundle; the runtime is then as it was.
        """
        if adapter is not None:
            name = next(name for name, entry in self.manifest.backends.items() if entry.identity == self.identity)
            raise InputError(
                f"{self.bundle}: the {name} backend takes no adapters",
                field="adapter",
                value=adapter.folder,
                hint="use `backend` onnx, or merge the adapter into a bundle of its own with `lora`",
            )

    def pin(self, count: int) -> None:
        """Let every token see the first `count` ones of its text in the global layers, however far back they are; 0 pins nothing.

        They may be fed before or afterwards. Once the text is longer than the context, another number than before begins at
        position 0.

        Raises:
            InputError: the bundle does not keep so many.
        """
        if not 0 <= count <= self.cache.pinned:
            raise InputError(
                f"cannot pin {count} tokens: this bundle keeps at most {self.cache.pinned} beyond its context",
                field="count",
                value=count,
                hint="export it with a larger `pinned`",
            )
        if count != self.pinned and self._position > self.cache.context:
            self.reset()
        self.pinned = count

    @property
    def scored_at_once(self) -> int:
        """The largest number of tokens that `_forward` is given with logits at every position."""
        return scored_at_once(self.cache.prefill_chunk, self.vocab_size)

    @property
    def reach(self) -> int:
        """Tokens back that a cache can depend on: a layer's oldest key saw the window of the layer below, and so on."""
        return 1 + sum(layer.window - 1 for layer in self.cache.layers)

    @property
    def position(self) -> int:
        """Tokens fed since the last reset, including those that have slid out of the window."""
        return self._position

    @property
    def ids(self) -> list[int]:
        """The last tokens fed: as many as the cache can depend on and `context` more, and always the last few thousand."""
        return self._kept.tolist()

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append `ids` (at least one) at the current position, chunk by chunk; return the logits (V,) after the last of them.

        Raises:
            InputError: no token, or an id that is not in the vocabulary.
        """
        start = time.perf_counter()
        logits = np.empty((0, 0), np.float32)
        for chunk in self._chunks(ids, self._at_once):
            logits = self._step(chunk, every_position=False)
        self.stats.prefill_tokens += len(ids)
        self.stats.prefill_s += time.perf_counter() - start
        last: Logits = logits[-1]  # (V,)
        return last

    def decode(self, token: int) -> Logits:
        """Append one token; return the logits (V,) after it."""
        start = time.perf_counter()
        logits = self._step(self._chunks([token], 1)[0], every_position=False)
        self.stats.decode_tokens += 1
        self.stats.decode_s += time.perf_counter() - start
        last: Logits = logits[-1]  # (V,)
        return last

    def decode_many(self, tokens: Sequence[int]) -> Logits:
        """Append tokens; return the logits (T, V) after each of them."""
        start = time.perf_counter()
        chunks = self._chunks(tokens, self.scored_at_once)
        logits = np.concatenate([self._step(chunk, every_position=True) for chunk in chunks])
        self.stats.decode_tokens += len(tokens)
        self.stats.decode_s += time.perf_counter() - start
        return logits

    def score_chunks(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Logits of every position from a reset state, (<= scored_at_once, V) at a time."""
        chunks = self._chunks(ids, self.scored_at_once)
        self.reset()
        for chunk in chunks:
            yield self._step(chunk, every_position=True)

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits (T, V) at every position of `ids`, from a reset state."""
        return np.concatenate(list(self.score_chunks(ids)))

    def reset(self) -> None:
        """Forget everything; the next token is at position 0."""
        self._clear()
        self._position = self._written = 0
        del self._kept[:]

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens: what follows is as if they had never been fed.

        It is free as long as the cache holds every key that is needed from there on. If not, the remaining tokens are fed again.

        Raises:
            InputError: `count` is negative, or more than were fed, or more than are remembered.
        """
        target = self._position - count
        if count < 0 or target < 0:
            raise InputError(
                f"cannot rewind {count} tokens: {self._position} were fed; give 0 to {self._position}",
                field="count",
                value=count,
            )
        first = self._position - len(self._kept)
        if count and not self._holds(target, self._written) and 0 < first > target - self.reach:
            remembered = self._position - self.reach - first
            raise InputError(
                f"cannot rewind {count} tokens: the last {remembered} are remembered; reset, and feed the text again",
                field="count",
                value=count,
            )
        del self._kept[len(self._kept) - count :]
        self._position = target
        if not count or self._holds(target, self._written):
            return
        ids, self._kept = self._kept, array("i")
        self._feed_again(ids, target - len(ids))

    def spare(self, max_tokens: int) -> int:
        """How many tokens, at most `max_tokens`, can be fed after the next one and be taken back for free."""
        start = self._position + 1
        count = 0
        while count < max_tokens and self._holds(start, max(self._written, start + count + 1)):
            count += 1
        return count

    def align(self, ids: Sequence[int]) -> int:
        """Rewind to the longest beginning of `ids` that was fed, its last token excepted; return its length."""
        first = self._position - len(self._kept)
        same = first
        for ours, theirs in zip(self._kept, ids[first:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        # without the ids before `first` only those count that the cache depends on
        pinned = self._first[: self.pinned]
        if first and (len(ids) <= first or same - first < self.reach or list(ids[: len(pinned)]) != pinned):
            same = 0
        if same:
            self.rewind(self._position - same)
        elif self._position:
            self.reset()
        return same

    def snapshot(self) -> State:
        """A copy of the state, tokens and cache; as large as what the cache holds."""
        ids = np.array(self._kept, np.int32)
        first = np.array(self._first[: min(self.pinned, self._position)], np.int32)
        return State(self.identity, self._position, self._written, ids, self._saved_rows(), self.pinned, first)

    def restore(self, state: State) -> None:
        """Go on from a state of this bundle and backend. The tokens of a state without a cache are fed again.

        Raises:
            InputError: the state belongs to another bundle or backend, or is damaged; this runtime is then as it was.
        """
        # Kotlin saves no cache where its library cannot reach it
        state.check(self.identity, self._layout(state.written) if state.rows else {})
        tokens = self._chunks(state.ids.tolist(), len(state.ids)) if len(state.ids) else []
        start = (state.ids if len(state.ids) == state.position else state.first)[: self.cache.pinned]
        first = self._chunks(start.tolist(), len(start))[0].tolist() if len(start) else []
        self.pin(state.pinned)
        self.reset()
        self._first = first
        if not state.rows and tokens:
            self._feed_again(array("i", tokens[0].tolist()), state.position - len(state.ids))
            return
        self._fill(state.rows)
        self._kept = array("i", state.ids.tolist())
        self._position, self._written = state.position, state.written

    def _feed_again(self, ids: Sequence[int], start: int) -> None:
        """Write the cache anew with what is pinned and with `ids`, which begin at position `start`."""
        self._clear()
        for begin, part in ((0, self._first[: min(self.pinned, start)]), (start, ids)):
            self._position = self._written = begin
            self._kept = array("i")
            self.stats.refed_tokens += len(part)
            for at in range(0, len(part), self._at_once):
                self._step(np.array(part[at : at + self._at_once], np.int64), every_position=False)

    def _step(self, chunk: NDArray[np.int64], *, every_position: bool) -> Logits:
        done = False
        try:
            logits = self._forward(chunk, every_position=every_position)
            done = True
        finally:
            if not done:  # interrupted, so the contents of the cache are unknown
                self.reset()
        if self._position < self.cache.pinned:
            self._first = [*self._first[: self._position], *chunk.tolist()][: self.cache.pinned]
        self._position += len(chunk)
        self._written = max(self._written, self._position)
        self._kept.extend(chunk.tolist())
        if len(self._kept) > 2 * self._max_remembered:
            del self._kept[: -self._max_remembered]
        return logits

    def _chunks(self, ids: Sequence[int], size: int) -> list[NDArray[np.int64]]:
        """Split into chunks of at most `size`, after checking the ids."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise InputError("no token to feed: give at least one token id")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise InputError(f"token id {bad} is not below the vocabulary size {self.vocab_size}")
        return [tokens[start : start + size] for start in range(0, len(tokens), size)]
