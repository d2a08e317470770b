"""A bundle as something to evaluate: it is computed by its own engine, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gemma_edge.bundle.backends import choose_backend
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.evaluate.model import Model
from gemma_edge.logits import Logits, scored_at_once
from gemma_edge.progress import Progress
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.text.tokenizer import Tokenizer
from gemma_edge.text.windows import Window


class BundleModel:
    """A `Model`. The bundle is loaded only while its logits are computed, so that one model is in memory at a time."""

    kind = "bundle"

    def __init__(self, path: Path, *, backend: str | None, threads: int | None) -> None:
        """Read the manifest.

        Raises:
            InputError: the folder is not a bundle, is damaged, or has no backend that can run here.
        """
        self.path, self._threads = path, threads
        self.manifest = manifest = Manifest.load(path)
        self.backend = choose_backend(path, manifest, backend)
        self.config, self._cache = manifest.config, manifest.backends[self.backend].cache
        self.context = self._cache.context
        self.size = manifest.bytes
        parts = manifest.recipe.parts
        weights = sum(part.weights for part in parts)
        self.bits_per_weight = 8 * sum(part.bytes for part in parts) / weights if weights else None

    def steps(self, windows: Sequence[Window]) -> int:
        """How many chunks all windows have together."""
        chunk = scored_at_once(self._cache.prefill_chunk, self.config.vocab_size)
        return sum(-(-(len(window.ids) - 1) // chunk) for window in windows)

    def rows(self, windows: Sequence[Window], progress: Callable[[int], None]) -> Iterator[tuple[Window, int, Logits]]:
        """See `Model.rows`."""
        runtime = self.runtime()
        for window in windows:
            position = 0
            # The last token is a target only: it is not fed.
            for chunk in runtime.score_chunks(window.ids[:-1]):
                rows = chunk[max(0, window.first - position) :]
                position += len(chunk)
                if len(rows):
                    yield window, position - len(rows), rows
                progress(1)

    def layer_errors(self, original: Model | None, ids: Sequence[int], progress: Progress) -> list[float]:
        """The errors that calibration wrote into the manifest; [] for a bundle that was not calibrated."""
        layers = self.manifest.recipe.calibration.layers
        return [entry.relative_error for entry in sorted(layers, key=lambda entry: entry.layer)]

    def runtime(self) -> Runtime:
        """The bundle, loaded."""
        return open_runtime(self.path, backend=self.backend, threads=self._threads)

    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None for a token-level bundle."""
        return Tokenizer(self.path, self.manifest) if self.manifest.tokenizer else None
