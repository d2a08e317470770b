"""The bundle: a folder with `manifest.json` and the files it lists. Appears atomically, checked when opened.

Only dataclasses and json: the runtimes import this module on machines without torch. What the numbers mean is written in
docs/bundle-format.md; the numbers themselves come from plan.py, a backend module and verify.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.errors import InputError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BackendEntry:
    """One backend of a bundle. Backends share the integers and the context; how each keeps its cache is its own."""

    cache: CacheGeometry
    plan: dict[str, Any]  # bytes and RAM predicted before the export
    settings: dict[str, Any]  # roles of its files, and what its runtime needs to know

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BackendEntry:
        """Inverse of `asdict`."""
        return cls(**{**data, "cache": CacheGeometry.from_json(data["cache"])})


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. Written last; a folder without it is no bundle."""

    model: dict[str, Any]  # name, source, parameters
    config: dict[str, Any]  # Gemma2Config, HF keys; with bos_token_id and the list eos_token_id
    recipe: dict[str, Any]  # method, bits, group_size, rules, and what each weight got
    target: dict[str, Any]  # name, ram_bytes, threads
    backends: dict[str, BackendEntry]  # by name, the default first
    files: dict[str, FileEntry]  # path inside the bundle -> size and hash
    tokenizer: bool  # False: a token-level bundle, without tokenizer files
    tools: dict[str, str]  # package -> version at export
    verification: dict[str, Any]  # backend -> gate result; {} means nobody verified it
    created: str  # ISO 8601, UTC
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The manifest's text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read and check a bundle's manifest; the files' presence and size too, their hashes not (`check_hashes`).

        Raises:
            InputError: no bundle, another schema version, a file missing, truncated or outside the folder.
        """
        path = bundle / MANIFEST
        if not path.is_file():
            raise InputError(f"{bundle} is not a bundle: no {MANIFEST} in it; make one with gemma-export")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.get("schema_version")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}); export the bundle again") from None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{path}: schema_version {version}, this gemma-edge reads {SCHEMA_VERSION}; export the bundle again"
            )
        try:
            data["backends"] = {name: BackendEntry.from_json(entry) for name, entry in data["backends"].items()}
            data["files"] = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            manifest = cls(**data)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}); export the bundle again") from None
        for name, entry in manifest.files.items():
            size = confined(bundle, name).stat().st_size
            if size != entry.bytes:
                raise InputError(f"{bundle / name}: {size} bytes, the manifest says {entry.bytes}; export it again")
        return manifest


def confined(bundle: Path, name: str) -> Path:
    """The path of a file named in a manifest; never outside the bundle.

    Raises:
        InputError: the name leads out of the bundle, or nothing is there.
    """
    path = bundle / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{bundle / MANIFEST} names {name!r}, which lies outside the bundle; do not use this bundle")
    if not path.is_file():
        raise InputError(f"{path} is missing; export the bundle again")
    return path


def sha256(path: Path, progress: Callable[[int], None] = lambda done: None) -> str:
    """Hash of a file's bytes; `progress` is called with the bytes just read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def check_hashes(bundle: Path, manifest: Manifest, progress: Callable[[int], None] = lambda done: None) -> None:
    """Compare every file with the hash in the manifest.

    Raises:
        InputError: the first file that differs, with both hashes.
    """
    for name, entry in manifest.files.items():
        found = sha256(confined(bundle, name), progress)
        if found != entry.sha256:
            raise InputError(
                f"{bundle / name} was changed: sha256 {found[:16]}..., the manifest says {entry.sha256[:16]}...;"
                " export it again"
            )


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below a folder, for a manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, sha256(path)) for path in files}
