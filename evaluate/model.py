"""What can be evaluated, as a protocol. A bundle is bundle_model.py's, a folder folder_model.py's; open_model.py tells which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.logits import Logits
from gemma_edge.progress import Progress
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.text.tokenizer import Tokenizer
from gemma_edge.text.windows import Window


class Model(Protocol):
    """Something that predicts logits for tokens."""

    path: Path
    kind: str  # bundle or folder
    backend: str  # what computes: a bundle's backend, or torch
    config: ModelConfig
    context: int  # tokens that the model looks back on
    size: int  # bytes of a bundle's files, or of a folder's matrices
    bits_per_weight: float | None  # bits per weight of the matrices, scales included

    def steps(self, windows: Sequence[Window]) -> int:
        """How often `rows` reports progress."""

    def rows(self, windows: Sequence[Window], progress: Callable[[int], None]) -> Iterator[tuple[Window, int, Logits]]:
        """Predict every scored position of every window, in order.

        Args:
            windows: what is fed; each begins from a reset state.
            progress: called with 1 after each step.

        Yields:
            the window, the position of the first row in it, and the logits (t, V) of the positions from there on.
        """

    def layer_errors(self, original: Model | None, ids: Sequence[int], progress: Progress) -> list[float]:
        """The relative error of each layer's output.

        Args:
            original: the model to compare with.
            ids: (T,) tokens that are fed to both.
            progress: shows how far the work is.

        Returns:
            one number per layer; [] where they are not known.
        """

    def runtime(self) -> Runtime:
        """The model loaded, to generate with. Tasks need it."""

    def tokenizer(self) -> Tokenizer | None:
        """The model's own tokenizer; None where it has none."""
