"""Lowered halves in the user's cache: lowering one takes seconds, and depends on no weight.

A file holds the delegate's blob, its constants, and as JSON what belongs where. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import gemma_edge
from gemma_edge import user_cache
from gemma_edge.export.executorch.packing import Constant
from gemma_edge.export.executorch.seams import Half, Limits, Rows
from gemma_edge.export.executorch.templates import Delegate, Template, lower_half, template
from gemma_edge.files import replacing

log = logging.getLogger(__name__)
LIBRARIES = ("executorch", "torch", "torchao")
OURS = ("model", "export/executorch")  # folders of this package whose code decides what a half becomes
FILE, NOTES = "delegate.safetensors", "notes"
BLOB, SHARED, ARGUMENT = "blob", "shared.", "argument."  # tensors of the file; the last two end with a key or an index


def kept_template(build: Callable[[Rows], Half], weight: Rows, limits: Limits, about: tuple[object, ...]) -> Template:
    """A half's template, lowered now or before.

    Args:
        build: the half over given weights.
        weight: the weights to lower it over.
        limits: the largest values of its free sizes.
        about: everything that decides what the half computes; `repr` must tell two of them apart.

    Raises:
        RuntimeError: as `lower_half`.
    """
    path = _place(about)
    delegate = _read(path) if path else None
    if delegate is not None:
        return template(build(_shape), delegate, limits)
    half = build(weight)
    delegate = lower_half(half, limits)
    if path:
        _write(path, delegate)
    return template(half, delegate, limits)


def _shape(name: str, rows: int, columns: int) -> Tensor:
    """A weight that has a shape and no values."""
    return torch.empty(rows, columns, device="meta")


def _place(about: tuple[object, ...]) -> Path | None:
    """The file of a half; None: there is no cache here."""
    key = hashlib.sha256(repr((about, _code(), [version(name) for name in LIBRARIES])).encode()).hexdigest()[:32]
    try:
        return user_cache.folder("executorch", key) / FILE
    except (OSError, RuntimeError) as error:
        log.info("lowered halves are not kept: %s", error)
        return None


@cache
def _code() -> str:
    """Hash of our own code that a half is made by."""
    root = Path(gemma_edge.__file__).parent
    files = sorted(path for folder in OURS for path in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _write(path: Path, delegate: Delegate) -> None:
    """Keep a delegate. Where the disk is full it is lowered again next time."""
    tensors = {BLOB: _tensor(delegate.blob)}
    tensors |= {f"{SHARED}{key}": _tensor(value) for key, value in delegate.shared.items()}
    arguments = enumerate(delegate.arguments)
    tensors |= {f"{ARGUMENT}{at}": value.contiguous() for at, value in arguments if isinstance(value, Tensor)}
    notes = {
        "keys": {key: asdict(constant) for key, constant in delegate.keys.items()},
        "arguments": [None if isinstance(value, Tensor) else value for value in delegate.arguments],
        "outputs": list(delegate.outputs),
    }
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, {NOTES: json.dumps(notes)})
    except (OSError, SafetensorError) as error:
        log.info("%s is not kept: %s", path, error)


def _read(path: Path) -> Delegate | None:
    """A delegate that was kept; None where there is none, or a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
            notes: dict[str, Any] = json.loads(file.metadata()[NOTES])
        return Delegate(
            tensors[BLOB].numpy().tobytes(),
            {key: Constant(**constant) for key, constant in notes["keys"].items()},
            {name.removeprefix(SHARED): tensors[name].numpy().tobytes() for name in tensors if name.startswith(SHARED)},
            [tensors[f"{ARGUMENT}{at}"] if value is None else value for at, value in enumerate(notes["arguments"])],
            notes["outputs"],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _tensor(value: bytes) -> Tensor:
    return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
