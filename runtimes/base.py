"""What every backend looks like to the code above it: tokens in, logits out, a cache that never grows.

A backend implements `_forward` and `_clear`; chunking, positions and statistics are here. Sampling, text and chat are
generate.py's, tokenizer.py's and session.py's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.errors import InputError
from gemma_edge.export.bundle import Manifest

Logits = NDArray[np.float32]


@dataclass
class Stats:
    """What a runtime has done since it was opened."""

    load_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second; 0 before the first prompt."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second; 0 before the first token."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


SCORED_BYTES = 1 << 26  # of logits in one call: twice as much is in memory meanwhile


def scored_at_once(manifest: Manifest) -> int:
    """Positions in one chunk of `score_chunks`: a prefill chunk, or fewer where a large vocabulary makes their logits large."""
    return max(1, min(manifest.cache.prefill_chunk, SCORED_BYTES // (4 * int(manifest.config["vocab_size"]))))


class Runtime(Protocol):
    """A loaded bundle with one KV cache."""

    bundle: Path
    manifest: Manifest
    stats: Stats

    @property
    def position(self) -> int:
        """Tokens fed since the last reset, also those that have slid out of the window."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append `ids` (at least one) at the current position; return the logits (V,) after the last of them."""

    def decode(self, token: int) -> Logits:
        """Append one token; return the logits (V,) after it."""

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits (T, V) at each position of `ids`, from a reset state."""

    def score_chunks(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The rows of `score`, some at a time: (<= scored_at_once, V) each."""

    def reset(self) -> None:
        """Forget everything; the next token is at position 0."""


class BaseRuntime(ABC):
    """The part of `Runtime` that no backend needs to write again."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.stats = Stats()
        self._position = 0
        self._at_once = manifest.cache.prefill_chunk  # most tokens that `prefill` hands to `_forward`

    @abstractmethod
    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """Run one chunk (T,), 1 <= T <= `_at_once`, at `self._position`; logits (T, V), or (1, V) of the last."""

    @abstractmethod
    def _clear(self) -> None:
        """Bring the cache into its first state."""

    @property
    def position(self) -> int:
        """Tokens fed since the last reset."""
        return self._position

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append `ids` chunk by chunk; return the logits (V,) after the last of them."""
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

    def score_chunks(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Logits of every position from a reset state, (<= scored_at_once, V) at a time."""
        chunks = self._chunks(ids, scored_at_once(self.manifest))
        self.reset()
        for chunk in chunks:
            yield self._step(chunk, every_position=True)

    def score(self, ids: Sequence[int]) -> Logits:
        """Logits (T, V) at every position of `ids`, from a reset state."""
        return np.concatenate(list(self.score_chunks(ids)))

    def reset(self) -> None:
        """Forget everything; the next token is at position 0."""
        self._clear()
        self._position = 0

    def _step(self, chunk: NDArray[np.int64], *, every_position: bool) -> Logits:
        logits = self._forward(chunk, every_position=every_position)
        self._position += len(chunk)
        return logits

    def _chunks(self, ids: Sequence[int], size: int) -> list[NDArray[np.int64]]:
        """Split into chunks of at most `size`, after checking the ids."""
        tokens = np.asarray(ids, dtype=np.int64)
        vocab_size = int(self.manifest.config["vocab_size"])
        if tokens.ndim != 1 or tokens.size == 0:
            raise InputError("no token to feed: give at least one token id")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise InputError(f"token id {bad} is not below the vocabulary size {vocab_size}")
        return [tokens[start : start + size] for start in range(0, len(tokens), size)]


# backend -> (module, class, the package it needs, the extra that installs it)
RUNTIMES = {
    "onnx": ("gemma_edge.runtimes.onnx", "OnnxRuntime", "onnxruntime", "onnx"),
    "executorch": ("gemma_edge.runtimes.executorch", "ExecuTorchRuntime", "executorch", "executorch"),
    "tflite": ("gemma_edge.runtimes.tflite", "TFLiteRuntime", "ai_edge_litert", "tflite"),
}


def how_to_install(backend: str) -> str | None:
    """The command that installs a backend's package; None where it is installed."""
    _, _, package, extra = RUNTIMES[backend]
    return None if importlib.util.find_spec(package) else f"pip install 'gemma-edge[{extra}]'"


def refuse_older(package: str, version: str, oldest: tuple[int, int]) -> None:
    """Refuse a runtime's package that does not know what bundles ask of it.

    Raises:
        InputError: `version` lies before `oldest`.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < oldest:
        wanted = ".".join(map(str, oldest))
        raise InputError(
            f"{package} {version} is too old, bundles need {wanted} or newer; pip install -U '{package}>={wanted}'"
        )


def thread_count(asked: int | None, manifest: Manifest) -> int:
    """Threads to use: those asked for, else the target's; no more than the machine has.

    Raises:
        InputError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise InputError(f"threads {asked} is below 1")
    return min(asked or int(manifest.target["threads"]), os.cpu_count() or 1)


def choose_backend(bundle: Path, manifest: Manifest, backend: str | None = None) -> str:
    """The backend that will run a bundle: the one asked for, else the first that is installed.

    Raises:
        InputError: the bundle does not hold it, or none is installed.
    """
    missing = []
    for name in [backend] if backend else list(manifest.backends):
        if name not in manifest.backends:
            raise InputError(f"{bundle} holds no {name!r} backend, only {', '.join(manifest.backends)}")
        if name not in RUNTIMES:
            raise InputError(
                f"{bundle}: this gemma-edge cannot run the {name!r} backend; it runs {', '.join(RUNTIMES)}"
            )
        command = how_to_install(name)
        if command is None:
            return name
        missing.append(f"{name}: {command}")
    raise InputError(f"no runtime installed for {bundle}: {'; '.join(missing)}")


def open_runtime(bundle: str | Path, *, backend: str | None = None, threads: int | None = None) -> Runtime:
    """`gemma_edge.load`; see there."""
    folder = Path(bundle)
    manifest = Manifest.load(folder)
    module, cls, _, _ = RUNTIMES[choose_backend(folder, manifest, backend)]
    start = time.perf_counter()
    runtime: Runtime = getattr(importlib.import_module(module), cls)(folder, manifest, threads=threads)
    runtime.stats.load_s = time.perf_counter() - start
    return runtime
