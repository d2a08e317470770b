"""Tells a bundle from a Hugging Face folder, and opens it for evaluation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.errors import InputError
from gemma_edge.evaluate.bundle_model import BundleModel
from gemma_edge.evaluate.model import Model


def open_model(path: Path, *, backend: str | None = None, threads: int | None = None) -> Model:
    """Open a bundle (a folder with a manifest) or a Hugging Face folder. Only headers are read.

    Args:
        path: the folder.
        backend: which backend of a bundle computes; None takes the first that is installed.
        threads: how many threads a bundle uses; None takes what its target says.

    Raises:
        InputError: the folder is neither, or is damaged, or PyTorch is not installed, which a Hugging Face folder needs.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a bundle or a Hugging Face model folder")
    if (path / MANIFEST).is_file():
        return BundleModel(path, backend=backend, threads=threads)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is neither a bundle (no {MANIFEST}) nor a Hugging Face model folder (no config.json)")
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path} is a Hugging Face folder: evaluating it needs PyTorch, which this installation leaves out:"
            " pip install 'gemma-edge[export]'"
        )
    from gemma_edge.evaluate.folder_model import CheckpointModel

    return CheckpointModel(path)
