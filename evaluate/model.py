"""What can be evaluated, behind one protocol: a bundle in its own engine, or a Hugging Face folder in torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.progress import Progress
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.text.tokenizer import Tokenizer
from gemma_edge.text.windows import Window


class Model(Protocol):
    """Something that gives logits. `evaluate/folder_model.py` has the one for folders."""

    path: Path
    kind: str  # bundle or folder
    backend: str  # what computes
    config: ModelConfig
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


def open_model(path: Path, *, backend: str | None = None, threads: int | None = None) -> Model:
    """A bundle (it has a manifest) or a Hugging Face folder; only headers are read.

    Raises:
        InputError: neither, damaged, or a folder without torch installed.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a bundle or a Hugging Face model folder")
    if (path / MANIFEST).is_file():
        from gemma_edge.evaluate.bundle_model import BundleModel

        return BundleModel(path, backend=backend, threads=threads)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is neither a bundle (no {MANIFEST}) nor a Hugging Face model folder (no config.json)")
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path} is a Hugging Face folder: evaluating one needs PyTorch, which this installation leaves out:"
            " pip install 'gemma-edge[export]'"
        )
    from gemma_edge.evaluate.folder_model import CheckpointModel

    return CheckpointModel(path)
