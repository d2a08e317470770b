"""The bundle: a folder with `manifest.json` and the files that it lists. docs/export/bundle-format.md explains each key.

This file reads and writes a manifest and checks the files. Its parts are in entries.py, geometry.py and settings.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from gemma_edge.bundle import codec
from gemma_edge.bundle.checks import config_problems, problems
from gemma_edge.bundle.codec import HINT, KeyProblem, key_path, shown
from gemma_edge.bundle.entries import (
    BackendEntry,
    FileEntry,
    GateResult,
    ModelConfig,
    ModelEntry,
    RecipeEntry,
    TargetEntry,
)
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.settings import SETTINGS
from gemma_edge.errors import InputError
from gemma_edge.file_hash import file_hash
from gemma_edge.files import link_home, sha256
from gemma_edge.reading import present, read_bytes

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
SMALL_BYTES = 4 << 20  # a file up to this size is hashed at every open, a larger one once for each state of it


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. It is written last: a folder without it is not a bundle."""

    model: ModelEntry
    config: ModelConfig
    recipe: RecipeEntry
    target: TargetEntry
    backends: dict[str, BackendEntry[Any]]  # by name, the default first
    files: dict[str, FileEntry]  # by path inside the bundle
    tokenizer: bool  # False: a token-level bundle, without tokenizer files
    tools: dict[str, str]  # package -> version at export
    verification: dict[str, GateResult]  # by backend; {}: nobody verified the bundle
    created: str  # ISO 8601, UTC
    schema_version: Literal[3] = 3

    def to_json(self) -> str:
        """The manifest's text."""
        return codec.text_of(self)

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return total_bytes(self.files)

    def save(self, bundle: Path) -> None:
        """Write the manifest into a bundle that is being made."""
        (bundle / MANIFEST).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read and check a bundle's manifest. Files must be there with their sizes; their hashes are `check_hashes`'s.

        Raises:
            InputError: no bundle, another schema version, a key that is missing, has another type or is out of range,
                a file that is missing, truncated or outside the folder.
        """
        path = bundle / MANIFEST
        with codec.damage_named(path):
            manifest = _decode(_read(bundle, path), path)
        _check_files(bundle, manifest)
        parts = manifest.model, manifest.config, manifest.backends, manifest.files, manifest.verification
        for conflict in problems(*parts):
            raise conflict.error(path)
        return manifest


def _read(bundle: Path, path: Path) -> bytes:
    """The manifest's bytes.

    Raises:
        InputError: there is none, or it is no file of a sane size that can be read.
    """
    if not present(path):
        raise InputError(f"{bundle} is not a bundle: no {MANIFEST} in it; make one with gemma-export")
    return read_bytes(path, HINT, max_bytes=MAX_MANIFEST_BYTES)


def _decode(text: bytes, path: Path) -> Manifest:
    """The manifest in a text.

    Raises:
        InputError: another schema version.
        ValueError: no JSON.
        KeyProblem: a key that is missing, or has a value of another type or out of range.
    """
    data = codec.parse(text)
    if not isinstance(data, dict):
        raise KeyProblem((), data, "an object")
    if "schema_version" not in data:
        raise KeyProblem(("schema_version",), None, "there", missing=True)
    version = data["schema_version"]
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {shown(version)}, this gemma-edge reads {SCHEMA_VERSION}",
            field="schema_version",
            value=version,
            hint=HINT,
        )
    manifest = codec.convert(data, Manifest)
    typed = {
        name: replace(entry, settings=typed_settings(name, entry.settings)) for name, entry in manifest.backends.items()
    }
    return replace(manifest, backends=typed)


def typed_settings(backend: str, settings: Any) -> Any:
    """The settings of a backend as its class in settings.py; of an unknown backend any JSON object, as it is.

    Raises:
        KeyProblem: they do not fit the class.
    """
    return codec.convert(settings, SETTINGS.get(backend, dict[str, Any]), ("backends", backend, "settings"))


def typed_config(config: Mapping[str, Any]) -> ModelConfig:
    """A model's configuration as a manifest holds it.

    Args:
        config: Hugging Face's keys, as `GemmaConfig.to_json` gives them.

    Raises:
        InputError: no runtime could use it.
    """
    try:
        typed = codec.convert(dict(config), ModelConfig, ("config",))
        for problem in config_problems(typed):
            raise problem
    except KeyProblem as problem:
        raise InputError(
            f"{key_path(problem.keys)} is {shown(problem.value)}",
            field=key_path(problem.keys),
            value=problem.value,
            hint=f"it must be {problem.expected}",
        ) from None
    return typed


def state_identity(backend: str, config: ModelConfig, cache: CacheGeometry, files: Mapping[str, FileEntry]) -> str:
    """SHA-256 of all that a saved state depends on: the backend's name, the model, the cache's geometry and every file's bytes.

    It is computed once, when a bundle is made. Readers take it from the manifest and compare it with the state's.
    """
    hashes = {name: entry.sha256 for name, entry in files.items()}
    text = msgspec.json.encode([backend, asdict(config), asdict(cache), hashes], order="sorted")
    return hashlib.sha256(text).hexdigest()


def with_identities(manifest: Manifest) -> Manifest:
    """The same manifest with every backend's `identity` computed from its contents."""
    backends = {
        name: replace(entry, identity=state_identity(name, manifest.config, entry.cache, manifest.files))
        for name, entry in manifest.backends.items()
    }
    return replace(manifest, backends=backends)


def _check_files(bundle: Path, manifest: Manifest) -> None:
    """Compare the files with their sizes, and let no name lead out of the bundle.

    Raises:
        InputError: the first file that differs.
    """
    for name, entry in manifest.files.items():
        size = confined(bundle, name).stat().st_size
        if size != entry.bytes:
            raise InputError(
                f"{bundle / name}: {size} bytes, the manifest says {entry.bytes}; copy the bundle again, or export it again"
            )
    for backend in manifest.backends.values():
        for name in backend.files:
            if _place_of(bundle, name) == "outside":
                raise _outside(bundle, name)


def _place_of(bundle: Path, name: str) -> Literal["inside", "outside", "nowhere"]:
    """Where a name leads. Nowhere: it is not a file name at all."""
    try:
        inside = not Path(name).is_absolute() and (bundle / name).resolve().is_relative_to(link_home(bundle))
        (bundle / name).is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, or a circle of links
        return "nowhere"
    if not inside:
        return "outside"
    return "inside" if name.isprintable() else "nowhere"


def _outside(bundle: Path, name: str) -> InputError:
    return InputError(f"{bundle / MANIFEST} names {name!r}, which lies outside the bundle; do not use this bundle")


def confined(bundle: Path, name: str) -> Path:
    """The path of a file named in a manifest; never outside the bundle.

    Raises:
        InputError: the name leads out of the bundle, or nothing is there.
    """
    place = _place_of(bundle, name)
    if place == "outside":
        raise _outside(bundle, name)
    if place == "nowhere":
        raise InputError(f"{bundle / MANIFEST} names {shown(name)}, which is not a file name; {HINT}")
    path = bundle / name
    if not path.is_file():
        raise InputError(f"{path} is missing; {HINT}")
    return path


def intact(bundle: Path, files: Mapping[str, FileEntry], name: str) -> Path:
    """The path of a file whose bytes are those that the manifest names.

    A small file is hashed each time, a large one once for each state of the file (file_hash.py).

    Args:
        bundle: the folder.
        files: the manifest's.
        name: the file's name in the manifest.

    Raises:
        InputError: it is not in the manifest, is missing, lies outside the bundle, or was changed.
    """
    path = confined(bundle, name)
    if name not in files:
        raise InputError(f"{bundle / MANIFEST} does not list {shown(name)} in files; {HINT}")
    entry = files[name]
    try:
        _compare(path, entry, sha256(path) if entry.bytes <= SMALL_BYTES else file_hash(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {HINT}") from None
    return path


def check_hashes(bundle: Path, manifest: Manifest, progress: Callable[[int], None] = lambda done: None) -> None:
    """Compare every file with the hash in the manifest.

    Raises:
        InputError: the first file that differs, with both hashes.
    """
    for name, entry in manifest.files.items():
        _compare(bundle / name, entry, sha256(confined(bundle, name), progress))


def _compare(path: Path, entry: FileEntry, result: str) -> None:
    if result != entry.sha256:
        raise InputError(
            f"{path} was changed: sha256 {result[:16]}..., the manifest says {entry.sha256[:16]}...;"
            " copy the bundle again, or export it again"
        )


def total_bytes(files: Mapping[str, FileEntry]) -> int:
    """Of all files that a manifest lists."""
    return sum(entry.bytes for entry in files.values())


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below a folder, for a manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, sha256(path)) for path in files}
