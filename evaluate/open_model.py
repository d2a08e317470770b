"""Tells a bundle from a Hugging Face folder or a GGUF file, and opens it for evaluation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.errors import InputError
from gemma_edge.evaluate.bundle_model import BundleModel
from gemma_edge.evaluate.model import Model
from gemma_edge.reading import is_gguf


def open_model(path: Path, *, backend: str | None = None, threads: int | None = None) -> Model:
    """Open a bundle (a folder with a manifest), a Hugging Face folder or a GGUF file. Only headers are read.

    Args:
        path: the folder or file.
        backend: which backend of a bundle computes; None takes the first that is installed.
        threads: how many threads a bundle uses; None takes what its target says.

    Raises:
        InputError: it is neither, or is damaged, or PyTorch is not installed, which all but a bundle need.
    """
    is_file = is_gguf(path) and not path.is_dir()
    if not path.is_dir() and not is_file:
        raise InputError(f"{path} is not a folder; give a bundle, a Hugging Face model folder or a GGUF file")
    if (path / MANIFEST).is_file():
        return BundleModel(path, backend=backend, threads=threads)
    if not is_file and not (path / "config.json").is_file():
        raise InputError(f"{path} is neither a bundle (no {MANIFEST}) nor a Hugging Face model folder (no config.json)")
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path} is a {'GGUF file' if is_file else 'Hugging Face folder'}: evaluating it needs PyTorch, which this"
            " installation leaves out: pip install 'gemma-edge[export]'"
        )
    from gemma_edge.evaluate.folder_model import CheckpointModel

    return CheckpointModel(path)
