"""A store behind a URL: s3, gs, az and whatever else fsspec reaches. Every node has a mirror of what it needs of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import fsspec

from gemma_edge import user_cache
from gemma_edge.bundle.staging import staged
from gemma_edge.errors import InputError, one_line
from gemma_edge.sweep.cluster.store import CACHED, UNIT, UNITS, Record, Store
from gemma_edge.sweep.units import RECORD, Unit, key_of

ANSWERS_S = 5  # seconds that a store may take to answer at all


def open_store(named: str | None, out: Path) -> Store:
    """The store at a path or URL; None: in the sweep's folder `out`.

    Raises:
        InputError: a URL that names no place.
    """
    if named is None or "://" not in named:
        return Store(Path(named or out / UNITS).absolute())
    if not named.partition("://")[2].strip("/"):
        raise InputError(
            f"`store` {named} names no place; give a folder too, as in s3://bucket/sweep", field="store", value=named
        )
    return RemoteStore(Path(), named.rstrip("/"))


@dataclass(frozen=True)
class RemoteStore(Store):
    """The folder of a URL. What a node makes it also keeps, and what it needs it fetches once."""

    url: str

    @property
    def shared(self) -> list[Path]:
        """No path: each node has a mirror of its own."""
        return []

    def place(self, unit: Unit) -> Path:
        """The folder of a unit in this machine's mirror."""
        return user_cache.folder(CACHED, key_of(self.url)) / unit.kind / unit.key

    def record(self, unit: Unit) -> Record | None:
        """What a finished unit found. Only what lies behind the URL counts: a node may end before it has sent its result."""
        with self._reached() as files:
            try:
                found: Record = json.loads(files.cat_file(f"{self._there(unit)}/{RECORD}"))
            except (FileNotFoundError, json.JSONDecodeError):  # half a record: the node ended while it sent it
                return None
        return found

    def make(self, unit: Unit, node: str) -> Record:
        """Fetch what a unit needs, do its work unless the mirror has it, and send the result.

        The record is sent last, so that it stands for a whole result.
        """
        for other in unit.after.values():
            self.fetch(other)
        record = super().record(unit) or super().make(unit, node)
        folder, there = self.place(unit), self._there(unit)
        paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == RECORD)
        with self._reached() as files:
            for path in paths:
                target = f"{there}/{path.relative_to(folder).as_posix()}"
                files.makedirs(target.rpartition("/")[0], exist_ok=True)
                files.put_file(str(path), target)
        return record

    def fetch(self, unit: Unit) -> None:
        """Have a finished unit's folder in the mirror."""
        if super().record(unit) is not None:
            return
        there = self._there(unit)
        with self._reached() as files, staged(self.place(unit), force=False, kind=UNIT) as work:
            for name in files.find(there):
                target = work / UNIT.folder / str(name).rpartition(there)[2].lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(target))

    def check(self) -> None:
        """Refuse a URL that cannot be written to.

        Raises:
            InputError: with the reason, or after ANSWERS_S without an answer.
        """
        outcome: Queue[InputError | None] = Queue()

        def ask() -> None:
            try:
                self._write()
            except InputError as error:
                outcome.put(error)
            else:
                outcome.put(None)

        threading.Thread(target=ask, daemon=True).start()  # a client may go on trying for a minute
        try:
            failure = outcome.get(timeout=ANSWERS_S)
        except Empty:
            failure = self._unusable(f"no answer within {ANSWERS_S} s")
        if failure:
            raise failure

    def _write(self) -> None:
        """Write something, and remove it."""
        with self._reached() as files:
            probe = f"{self._root(files)}/.probe"
            files.makedirs(self._root(files), exist_ok=True)
            files.pipe_file(probe, b"")
            files.rm_file(probe)

    def _there(self, unit: Unit) -> str:
        with self._reached() as files:
            return f"{self._root(files)}/{unit.kind}/{unit.key}"

    def _root(self, files: Any) -> str:
        return str(files._strip_protocol(self.url)).rstrip("/")

    @contextmanager
    def _reached(self) -> Iterator[Any]:
        """The file system behind the URL; its errors become one line."""
        try:
            yield fsspec.core.url_to_fs(self.url)[0]
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 (each client has errors of its own)
            raise self._unusable(one_line(error)) from None

    def _unusable(self, reason: str) -> InputError:
        return InputError(
            f"`store` {self.url} cannot be used: {reason}",
            field="store",
            value=self.url,
            hint="give a folder or URL that every node can write to",
        )
