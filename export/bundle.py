"""The bundle: a folder with `manifest.json` and the files it lists. Appears atomically, checked when opened.

Only dataclasses and json: the runtimes import this module on machines without torch. What the numbers mean is written in
docs/bundle-format.md; the numbers themselves come from plan.py, a backend module and verify.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LayerCache:
    """Geometry of one layer's KV cache, in tokens."""

    window: int  # keys a query may see, itself included
    slots: int  # rows allocated; >= window + prefill_chunk - 1


@dataclass(frozen=True)
class CacheGeometry:
    """The KV cache of the whole model: fixed when the bundle is made, whatever is generated."""

    context: int  # tokens the model can look back on; beyond it the oldest fall out
    prefill_chunk: int  # most tokens in one forward call
    kv_heads: int
    head_dim: int
    dtype: str  # numpy name
    layers: tuple[LayerCache, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all K and V buffers."""
        item = {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        return sum(2 * self.kv_heads * layer.slots * self.head_dim * item for layer in self.layers)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CacheGeometry:
        """Inverse of `asdict`."""
        return cls(**{**data, "layers": tuple(LayerCache(**layer) for layer in data["layers"])})


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


def _alive(pid: str) -> bool:
    if pid == str(os.getpid()):  # ours is not made yet: a dead process had the same number, as in a restarted container
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _clean_leftovers(out: Path) -> None:
    """Remove what a killed export of the same name left behind, and put back a bundle it had moved aside."""
    for kind in ("old", "partial"):
        for left in out.parent.glob(f".{out.name}.{kind}-*"):
            if _alive(left.name.rpartition("-")[2]):
                continue
            if kind == "old" and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)


def refuse_existing(out: Path, force: bool) -> None:
    """Let nothing be replaced without --force, and nothing but a bundle with it.

    Raises:
        InputError: something is there that stays.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists; pass --force to replace it, or -o for another folder")
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).exists() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not a bundle; --force replaces only bundles: pass -o for another folder")


def _make_folder(folder: Path, parent: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write in {parent}: {error.strerror}; pass -o for another folder") from None


@contextmanager
def staged(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out`; what is in its `bundle/` becomes `out` in one rename when the block ends well.

    Parents that are missing are made, and removed again when nothing is left in them.

    Raises:
        InputError: `out` exists and `force` is False, or its parent cannot be written.
    """
    _clean_leftovers(out)
    refuse_existing(out, force)
    work = out.parent / f".{out.name}.partial-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    missing = [parent for parent in out.absolute().parents if not parent.exists()]  # the innermost first
    try:
        _make_folder(work / "bundle", out.parent)
        yield work
        refuse_existing(out, force)  # somebody may have made it in the meantime
        if out.exists():
            out.rename(old)
        (work / "bundle").rename(out)
    finally:
        if old.exists() and not out.exists():  # interrupted between the two renames
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # not empty: the bundle is in it, or somebody else's files
                parent.rmdir()
