"""What can be evaluated, behind one interface: a bundle in its own runtime, a Hugging Face folder in the torch reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from gemma_edge.errors import InputError
from gemma_edge.export.bundle import MANIFEST, Manifest
from gemma_edge.runtimes.base import Logits, Runtime, choose_backend, open_runtime, scored_at_once
from gemma_edge.runtimes.tokenizer import Tokenizer
from gemma_edge.runtimes.windows import Window

# (what, total, in bytes or in steps) -> a context that yields a function to call with what was done
Progress = Callable[[str, int, bool], AbstractContextManager[Callable[[int], None]]]


class Model(Protocol):
    """Something that gives logits. `export/scorer.py` has the one for folders."""

    path: Path
    kind: str  # bundle or folder
    backend: str  # what computes
    config: dict[str, Any]  # Gemma2Config, HF's keys
    context: int  # tokens it can look back on
    size: int  # bytes: a bundle's files, a folder's matrices
    bits_per_weight: float | None  # of the matrices, scales included

    def steps(self, windows: Sequence[Window]) -> int:
        """How often `rows` reports progress."""

    def rows(self, windows: Sequence[Window], progress: Callable[[int], None]) -> Iterator[tuple[Window, int, Logits]]:
        """Logits of every scored position in order: the window, the position of the first row, and (t, V) rows."""

    def layer_errors(self, original: Model | None, ids: Sequence[int], progress: Progress) -> list[float]:
        """Relative error of each layer's output, as far as it is known; [] where it is not."""

    def runtime(self) -> Runtime:
        """To score and generate freely, for tasks."""

    def tokenizer(self) -> Tokenizer | None:
        """Its own, if it has one."""


class BundleModel:
    """A bundle; opened when it is its turn, so that one is in memory at a time."""

    kind = "bundle"

    def __init__(self, path: Path, *, backend: str | None, threads: int | None) -> None:
        self.path, self._threads = path, threads
        self.manifest = manifest = Manifest.load(path)
        self.backend = choose_backend(path, manifest, backend)
        self.config, self._cache = manifest.config, manifest.backends[self.backend].cache
        self.context = self._cache.context
        self.size = sum(entry.bytes for entry in manifest.files.values())
        parts = manifest.recipe.get("parts", [])
        weights = sum(part["weights"] for part in parts)
        self.bits_per_weight = 8 * sum(part["bytes"] for part in parts) / weights if weights else None

    def steps(self, windows: Sequence[Window]) -> int:
        """Chunks of all windows."""
        chunk = scored_at_once(self._cache.prefill_chunk, int(self.config["vocab_size"]))
        return sum(-(-(len(window.ids) - 1) // chunk) for window in windows)

    def rows(self, windows: Sequence[Window], progress: Callable[[int], None]) -> Iterator[tuple[Window, int, Logits]]:
        """See `Model.rows`."""
        runtime = self.runtime()
        for window in windows:
            position = 0
            # the last token is only foretold
            for chunk in runtime.score_chunks(window.ids[:-1]):
                rows = chunk[max(0, window.first - position) :]
                position += len(chunk)
                if len(rows):
                    yield window, position - len(rows), rows
                progress(1)

    def layer_errors(self, original: Model | None, ids: Sequence[int], progress: Progress) -> list[float]:
        """What calibration wrote into the manifest."""
        layers = self.manifest.recipe.get("calibration", {}).get("layers", [])
        return [float(entry["relative_error"]) for entry in sorted(layers, key=lambda entry: entry["layer"])]

    def runtime(self) -> Runtime:
        """The bundle, loaded."""
        return open_runtime(self.path, backend=self.backend, threads=self._threads)

    def tokenizer(self) -> Tokenizer | None:
        """The bundle's; None for a token-level bundle."""
        return Tokenizer(self.path, self.manifest) if self.manifest.tokenizer else None


def open_model(path: Path, *, backend: str | None = None, threads: int | None = None) -> Model:
    """A bundle (it has a manifest) or a Hugging Face folder; only headers are read.

    Raises:
        InputError: neither, damaged, or a folder without torch installed.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a bundle or a Hugging Face model folder")
    if (path / MANIFEST).is_file():
        return BundleModel(path, backend=backend, threads=threads)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is neither a bundle (no {MANIFEST}) nor a Hugging Face model folder (no config.json)")
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path} is a Hugging Face folder: evaluating one needs PyTorch, which this installation leaves out:"
            " pip install 'gemma-edge[export]'"
        )
    from gemma_edge.export.scorer import CheckpointModel

    return CheckpointModel(path)
