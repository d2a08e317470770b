"""What the two engines of `.tflite` models share: they feed a text to signatures of fixed sizes. Subclasses call a signature.

The model is made by export/tflite; docs/export/tflite.md is its contract. Each slot of a cache knows its position, so a reset
clears nothing: tokens from position 0 on make the model forget the rest.
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.entries import BackendEntry
from gemma_edge.bundle.manifest import Manifest, intact
from gemma_edge.bundle.settings import SignatureSettings
from gemma_edge.bundle.signature import Signature
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.load import STDERR, in_library, refuse_older, silent, thread_count
from gemma_edge.runtimes.engines.structure.tflite import check_model

log = logging.getLogger(__name__)

ERRORS = (RuntimeError, ValueError, KeyError, TypeError)  # of the libraries' Python bindings
PADDING = -1  # position of a token that fills up a call


class SignatureRuntime(Runtime):
    """A backend whose model is fed chunks of a few sizes, padded at their end."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: str,
        threads: int | None,
        *,
        package: str,
        oldest: tuple[int, int],
    ) -> None:
        """Check and keep what both engines need before they load the model.

        Args:
            bundle, manifest: the folder and what it says of itself.
            backend: its name in the manifest.
            threads: None takes the target's; no more than the machine has are used.
            package, oldest: what runs it, and the first version that can.

        Raises:
            InputError: the package is too old.
        """
        refuse_older(package, metadata.version(package), oldest)
        entry: BackendEntry[SignatureSettings] = manifest.backends[backend]
        super().__init__(bundle, manifest, entry.cache, entry.identity)
        self.threads = thread_count(threads, manifest)
        self._at_once = 1 << 30  # `_forward` splits by itself
        self._path = intact(bundle, manifest.files, entry.settings.program)
        log.info("loading %s with %d threads", self._path, self.threads)
        self._signatures = entry.settings.signatures
        self._marked = 0  # tokens whose slots say that they are pinned

    @abstractmethod
    def _call(self, signature: Signature, tokens: NDArray[np.int32], input_pos: NDArray[np.int32]) -> Logits | None:
        """Run a signature over (1, T) tokens at (T,) positions; its logits (T, V), unless it only prefills."""

    def _mark(self, count: int) -> None:
        """Mark the slots of the first `count` tokens as pinned, and no others; export/tflite/seams.py says how."""
        raise NotImplementedError

    def _roles(self, *roles: str) -> list[Signature]:
        return [signature for signature in self._signatures if signature.role in roles]

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        """See Runtime; any number of tokens."""
        if every_position:
            rows = self._feed(ids, self.position, self._roles("score", "decode"))
            return np.concatenate([logits for logits in rows if logits is not None])
        for _ in self._feed(ids[:-1], self.position, self._roles("prefill", "decode")):
            pass
        (logits,) = self._feed(ids[-1:], self.position + len(ids) - 1, self._roles("decode"))
        assert logits is not None
        return logits

    def _feed(self, ids: NDArray[np.int64], position: int, signatures: Sequence[Signature]) -> Iterator[Logits | None]:
        """Run tokens through the signatures that take the shortest time; yield the logits (t, V) of each call, or None."""
        while len(ids):
            pinned = self.pinned if position >= self.pinned else 0
            if pinned != self._marked:
                self._mark(pinned)
                self._marked = pinned
            right = (each for each in signatures if each.is_right(position, len(ids)))
            best = max(right, key=lambda each: each.worth(len(ids)))
            count = min(len(ids), best.tokens)
            if position < self.pinned:  # only what was written can be marked
                count = min(count, self.pinned - position)
            tokens, input_pos = np.zeros((1, best.tokens), np.int32), np.full(best.tokens, PADDING, np.int32)
            tokens[0, :count], input_pos[:count] = ids[:count], np.arange(position, position + count)
            logits = self._run(best, tokens, input_pos)
            yield None if logits is None else logits[:count]
            ids, position = ids[count:], position + count

    def _run(self, signature: Signature, tokens: NDArray[np.int32], input_pos: NDArray[np.int32]) -> Logits | None:
        with in_library(self._path, "does not run", ERRORS):
            return self._call(signature, tokens, input_pos)

    def _check(self, signature: Signature, shapes: Mapping[str, Any], caches: Mapping[str, Sequence[int]]) -> None:
        """Compare the shapes of a signature's inputs and outputs with the manifest's. `caches`: expected shapes of the caches."""
        logits = {} if signature.role == "prefill" else {"logits": [1, signature.tokens, self.vocab_size]}
        for key, shape in {
            "tokens": [1, signature.tokens],
            "input_pos": [signature.tokens],
            **logits,
            **caches,
        }.items():
            here = [int(size) for size in shapes[key]] if key in shapes else None
            if here != list(shape):
                raise InputError(
                    f"{self._path}: {key} of {signature.name} is {here}, the manifest says {list(shape)};"
                    " export the bundle again"
                )

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Silence the library, and turn its errors into an InputError."""
        with in_library(self._path, "is damaged, or is not a model of this bundle", ERRORS):
            check_model(self._path)
            with silent(STDERR):  # TFLite's lines about delegates
                yield

    def _holds(self, position: int, written: int) -> bool:
        """See Runtime.

        A chunk less one token of slots lies behind the ring. The last call wrote as much padding over keys that only a rewind
        needs.
        """
        return position == written or super()._holds(position, written + 2 * (self.cache.prefill_chunk - 1))

    def _clear(self) -> None:
        """At position 0 the model forgets what is not pinned."""
        if self._marked:
            self._mark(0)
            self._marked = 0
