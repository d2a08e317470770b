"""LiteRT on the CPU: `.tflite` signatures over one set of KV caches that are written in place.

The model is export/tflite's; docs/tflite.md holds its contract. A cache is one buffer that is input and output at once: what is
written stays where it is. Each of its slots knows its position, so a reset needs to clear nothing: tokens from position 0 on make
the model forget the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.environment import Environment
from ai_edge_litert.options import CpuOptions, Options
from ai_edge_litert.tensor_buffer import TensorBuffer
from numpy.typing import NDArray

from gemma_edge.errors import InputError
from gemma_edge.export.bundle import Manifest, confined
from gemma_edge.runtimes.base import BaseRuntime, Logits, refuse_older, thread_count
from gemma_edge.runtimes.weight_cache import kept_weights

log = logging.getLogger(__name__)

OLDEST_LITERT = (2, 3)
FIXED_COST = 16  # of a call, in tokens: reading the weights takes as long as computing about that many tokens
PADDING = -1  # position of a token that is not there


@dataclass(frozen=True)
class Signature:
    """A function of the model, with its buffers."""

    name: str
    tokens: int  # in one call
    inputs: Mapping[str, TensorBuffer]
    outputs: Mapping[str, TensorBuffer]


class TFLiteRuntime(BaseRuntime):
    """A bundle's TFLite backend."""

    def __init__(self, bundle: Path, manifest: Manifest, *, threads: int | None) -> None:
        """Load the model and make the caches.

        Args:
            bundle, manifest: the folder and what it says of itself.
            threads: None takes the target's; more than the machine has are not used.

        Raises:
            InputError: LiteRT is too old, or the file is not what the manifest says.
        """
        entry = manifest.backends["tflite"]
        super().__init__(bundle, manifest, entry.cache)
        refuse_older("ai-edge-litert", metadata.version("ai-edge-litert"), OLDEST_LITERT)
        self.threads = thread_count(threads, manifest)
        self._at_once = 1 << 30  # `_forward` splits by itself
        self._path = confined(bundle, entry.settings["program"])
        log.info("loading %s with %d threads", self._path, self.threads)
        self._caches: dict[str, TensorBuffer] = {}  # an input and an output of every signature
        self._roles: dict[str, list[Signature]] = {}
        try:
            with silent():
                self._model = self._load(manifest.files[entry.settings["program"]].sha256)
                for name, (role, tokens) in entry.settings["signatures"].items():
                    self._roles.setdefault(role, []).append(self._signature(name, tokens))
        except RuntimeError as error:
            raise InputError(
                f"{self._path} is damaged or no model of this bundle: {_one_line(error)}; export the bundle again"
            ) from None

    def _load(self, digest: str) -> CompiledModel:
        with kept_weights(digest, f"ai-edge-litert {metadata.version('ai-edge-litert')}") as path:
            cpu = CpuOptions(num_threads=self.threads, xnnpack_weight_cache_path=path)
            options = Options(cpu_options=cpu)
            return CompiledModel.from_file(str(self._path), environment=environment(), options=options)

    def _signature(self, name: str, tokens: int) -> Signature:
        model = self._model
        inputs, outputs = model.get_input_tensor_details(name), model.get_output_tensor_details(name)
        self._check_contract(name, tokens, inputs, outputs)
        for key, detail in inputs.items():
            if key in outputs and key not in self._caches:
                self._caches[key] = model.create_input_buffer_by_name(name, key)
                self._caches[key].write(np.zeros(detail["shape"], detail["dtype"]))
        return Signature(
            name,
            tokens,
            {key: self._caches.get(key) or model.create_input_buffer_by_name(name, key) for key in inputs},
            {key: self._caches.get(key) or model.create_output_buffer_by_name(name, key) for key in outputs},
        )

    def _check_contract(self, name: str, tokens: int, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Sizes of inputs and outputs against the manifest."""
        cache = self.cache
        wanted = {"tokens": [1, tokens], "input_pos": [tokens], "logits": [1, tokens, self.vocab_size]}
        for index, layer in enumerate(cache.layers):
            shape = [1, cache.kv_heads, layer.slots + cache.prefill_chunk - 1, cache.head_dim]
            wanted |= {f"kv_cache_{kind}_{index}": shape for kind in "kv"}
        found = {**inputs, **outputs}
        for key, shape in wanted.items():
            here = list(found[key]["shape"]) if key in found else None
            if here != shape and (key in inputs or key in outputs or key != "logits"):
                raise InputError(
                    f"{self._path}: {key} of {name} is {here}, the manifest says {shape}; export the bundle again"
                )

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """See BaseRuntime; any number of tokens."""
        (decode,) = self._roles["decode"]
        if every_position:
            rows = self._feed(ids, self.position, [*self._roles["score"], decode])
            return np.concatenate([logits for logits in rows if logits is not None])
        for _ in self._feed(ids[:-1], self.position, [*self._roles["prefill"], decode]):
            pass
        (logits,) = self._feed(ids[-1:], self.position + len(ids) - 1, [decode])
        assert logits is not None
        return logits

    def _feed(self, ids: NDArray[np.int64], position: int, signatures: Sequence[Signature]) -> Iterator[Logits | None]:
        """Run tokens through the signatures that take least time; the logits of each call, (t, V), where it has any."""
        while len(ids):
            best = max(signatures, key=lambda each: min(len(ids), each.tokens) / (each.tokens + FIXED_COST))
            count = min(len(ids), best.tokens)
            tokens, input_pos = np.zeros((1, best.tokens), np.int32), np.full(best.tokens, PADDING, np.int32)
            tokens[0, :count], input_pos[:count] = ids[:count], np.arange(position, position + count)
            best.inputs["tokens"].write(tokens)
            best.inputs["input_pos"].write(input_pos)
            self._run(best)
            yield self._logits(best)[:count] if "logits" in best.outputs else None
            ids, position = ids[count:], position + count

    def _run(self, signature: Signature) -> None:
        try:
            self._model.run_by_name(signature.name, signature.inputs, signature.outputs)
        except RuntimeError as error:
            raise InputError(f"{self._path} does not run: {_one_line(error)}; export the bundle again") from None

    def _logits(self, signature: Signature) -> Logits:
        flat = signature.outputs["logits"].read(signature.tokens * self.vocab_size, np.float32)
        logits: Logits = flat.reshape(signature.tokens, self.vocab_size)
        return logits

    def _holds(self, position: int, written: int) -> bool:
        """See BaseRuntime. The padding of the last call was written too, over keys that only a rewind would need."""
        return position == written or super()._holds(position, written + self.cache.prefill_chunk - 1)

    def _clear(self) -> None:
        """Nothing: position 0 makes the model forget."""


@lru_cache(1)
def environment() -> Environment:
    """LiteRT's environment, one for the process."""
    atexit.register(_end_silently)
    return Environment.create()


def _end_silently() -> None:
    """LiteRT's own end comes after Python's, and writes lines to stderr."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing on stderr: LiteRT tells of accelerators there, past Python, and has no other switch. Exceptions come through."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
