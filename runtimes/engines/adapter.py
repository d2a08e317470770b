"""An adapter beside a bundle: the factors of a LoRA, and the bundle's graphs with an input for each of them.

The folder is made by export/adapter; docs/export/adapters.md is its contract. Weights stay in the bundle. With the factors
A (in, r) and B (r, out) of a linear the graph computes y = W x + (x A) B, as PEFT does with an adapter that is not merged
(`tuners/lora/layer.py`). A rank of 0 is the model without the adapter, so adapters are switched by feeding other factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.codec import convert, damage_named, parse, text_of
from gemma_edge.bundle.entries import FileEntry, GateResult
from gemma_edge.bundle.manifest import intact
from gemma_edge.bundle.ranges import Count, Name, Sha256
from gemma_edge.errors import InputError, one_line
from gemma_edge.reading import MAX_JSON, present, read_bytes
from gemma_edge.runtimes.engines.state import ERRORS

ADAPTER, FACTORS = "adapter.json", "factors.safetensors"
HINT = "make the adapter again with gemma-export adapter"
ROLES = ("generate", "score")  # of the graphs, as in the bundle
SIDES = ("a", "b")  # names of a linear's factors end with these

Factor = NDArray[np.float32]


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter's folder says of itself."""

    name: Name  # of the PEFT folder
    base: Sha256  # `identity` of the backend that it was made for
    backend: Name
    factors: Literal["float32", "float16", "int8"]  # how they are stored
    rank: Count  # the largest
    linears: Count  # that have factors
    graphs: dict[str, str]  # by role: generate, score
    files: dict[str, FileEntry]
    verification: GateResult | None  # against the merged original; None: nobody verified it
    created: str  # ISO 8601, UTC
    schema_version: Literal[1] = 1

    def to_json(self) -> str:
        """The text of adapter.json."""
        return text_of(self)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter."""

    folder: Path
    manifest: AdapterManifest
    factors: Mapping[str, tuple[Factor, Factor]]  # linear without `.weight` -> A (in, r), and B (r, out) scaled

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read and check an adapter's folder.

        Raises:
            InputError: it is none, or a file is missing, damaged or changed.
        """
        place = Path(folder)
        path = place / ADAPTER
        if not present(path):
            raise InputError(
                f"{place} is not an adapter of a bundle: no {ADAPTER} in it",
                field="adapter",
                value=place,
                hint="make one with gemma-export adapter",
            )
        with damage_named(path, HINT):
            manifest = convert(parse(read_bytes(path, HINT, max_bytes=MAX_JSON)), AdapterManifest)
        adapter = cls(place, manifest, _factors(intact(place, manifest.files, FACTORS)))
        for role in ROLES:
            adapter.graph(role)
        return adapter

    @property
    def by_input(self) -> dict[str, Factor]:
        """The factors by the names of the graphs' inputs."""
        return {
            f"{name}.{side}": half
            for name, pair in self.factors.items()
            for side, half in zip(SIDES, pair, strict=True)
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the factors."""
        return self.manifest.files[FACTORS].sha256

    def graph(self, role: str) -> Path:
        """The graph of a role.

        Raises:
            InputError: there is none, or it was changed.
        """
        if role not in self.manifest.graphs:
            raise InputError(f"{self.folder} has no {role!r} graph; {HINT}")
        return intact(self.folder, self.manifest.files, self.manifest.graphs[role])

    def graph_digest(self, role: str) -> str:
        """SHA-256 of the graph of a role: adapters of one bundle have the same one."""
        return self.manifest.files[self.manifest.graphs[role]].sha256


def is_factor(name: str) -> bool:
    """Whether a graph's input is a factor."""
    return name.rpartition(".")[2] in SIDES


def adapted_identity(base: str, adapter: Adapter | None) -> str:
    """SHA-256 of what a state depends on that was saved with an adapter; without one it is the bundle's."""
    return hashlib.sha256(f"{base} {adapter.digest}".encode()).hexdigest() if adapter else base


def _factors(path: Path) -> dict[str, tuple[Factor, Factor]]:
    from safetensors.numpy import load_file

    try:
        stored = load_file(path)
    except ERRORS as error:
        raise InputError(f"{path} is damaged ({one_line(error)}); {HINT}") from None
    linears = sorted({name.rpartition(".")[0] for name in filter(is_factor, stored)})
    found = {}
    for linear in linears:
        a, b = (_floats(path, stored, f"{linear}.{side}", side) for side in SIDES)
        if a.shape[1] != b.shape[0]:
            raise InputError(f"{path}: {linear} has ranks {a.shape[1]} and {b.shape[0]}; {HINT}")
        found[linear] = a, b
    return found


def _floats(path: Path, stored: Mapping[str, NDArray[np.generic]], name: str, side: str) -> Factor:
    """One factor as float32. An integer one has a scale for each rank."""
    values = stored.get(name)
    if values is None or values.ndim != 2:
        raise InputError(f"{path} has no matrix {name}; {HINT}")
    result = values.astype(np.float32)
    if values.dtype == np.int8:
        scale, ranks = stored.get(f"{name}_scale"), values.shape[1 if side == "a" else 0]
        if scale is None or scale.shape != (ranks,):
            raise InputError(f"{path} has no {name}_scale with one scale for each rank; {HINT}")
        result *= scale.astype(np.float32).reshape((1, -1) if side == "a" else (-1, 1))
    if not np.isfinite(result).all():
        raise InputError(f"{path}: {name} holds NaN or infinite values; {HINT}")
    return np.ascontiguousarray(result)
