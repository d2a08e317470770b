"""A runtime's state, as a value and as one safetensors file: the token ids, and the rows of the KV cache that are in use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.codec import KeyProblem, convert, parse
from gemma_edge.errors import InputError, one_line
from gemma_edge.files import others_can_change, replacing

FORMAT = "gemma-edge state 2"
IDS = "ids"
FIRST = "first"  # ids of the pinned tokens
DIGEST = "sha256"
MAX_POSITION = 1 << 30  # tokens; the engines count in 32 bits
# ERRORS: what safetensors raises for a file of another format, or for types that NumPy does not have.
ERRORS = (KeyError, TypeError, ValueError, AttributeError, OSError, MemoryError)

# Layout: name of a cache's buffer -> shape and type of its rows that are in use
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True)
class _Numbers:
    """The value of `state` in a file's header."""

    identity: str
    position: int
    written: int
    pinned: int = 0


@dataclass(frozen=True)
class State:
    """The state of one runtime at one moment."""

    identity: str  # hash of the bundle and the backend that it belongs to
    position: int  # tokens fed
    written: int  # highest position written with what the cache holds; more than `position` after a rewind
    ids: NDArray[np.int32]  # (N,), the last tokens fed
    rows: Mapping[str, NDArray[Any]]  # cache buffer -> (..., rows in use, head_dim)
    pinned: int = 0  # tokens at the beginning that every later one sees
    first: NDArray[np.int32] = field(
        default_factory=lambda: np.zeros(0, np.int32)
    )  # their ids, as far as they were fed
    name: str = "the state"  # for messages: the path of the file that it was read from

    def check(self, identity: str, expected: Layout) -> None:
        """Compare with the runtime that is to go on from it.

        Args:
            identity: the runtime's identity.
            expected: the rows that this state would fill.

        Raises:
            InputError: it belongs to another bundle or backend, or it is damaged.
        """
        if self.identity != identity:
            raise InputError(
                f"{self.name} belongs to another bundle or backend ({self.identity[:16]}...; this one is"
                f" {identity[:16]}...); feed its text again"
            )
        actual = {name: (rows.shape, rows.dtype) for name, rows in self.rows.items()}
        odd = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
        if odd:
            raise InputError(
                f"{self.name} is damaged: {odd[0]} is {actual.get(odd[0])}, this bundle has {expected.get(odd[0])};"
                " make it again"
            )
        if not len(self.ids) <= self.position <= self.written <= MAX_POSITION or (self.position and not len(self.ids)):
            raise InputError(
                f"{self.name} is damaged: {len(self.ids)} ids, position {self.position} of {self.written}; make it again"
            )
        if len(self.first) != min(self.pinned, self.position):
            raise InputError(
                f"{self.name} is damaged: {len(self.first)} ids of {self.pinned} pinned tokens; make it again"
            )
        for name, rows in self.rows.items():
            if rows.dtype.kind == "f" and not np.isfinite(rows).all():
                raise InputError(f"{self.name} is damaged: {name} holds numbers that are not finite; make it again")


def write_state(path: Path, state: State, notes: Mapping[str, Any]) -> None:
    """Write a state; the file appears whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        state: what to write.
        notes: more to keep with it, of types that JSON has.

    Raises:
        InputError: there is no such folder, or it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    numbers = {
        "identity": state.identity,
        "position": state.position,
        "written": state.written,
        **({"pinned": state.pinned} if state.pinned else {}),
    }
    header = {"format": FORMAT, "state": json.dumps(numbers), "notes": json.dumps(notes, ensure_ascii=False)}
    first = {FIRST: state.first} if len(state.first) else {}
    named = {IDS: state.ids, **first, **{f"cache.{name}": rows for name, rows in state.rows.items()}}
    tensors = {name: np.ascontiguousarray(rows) for name, rows in named.items()}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, {**header, DIGEST: _digest(header, tensors)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}; name a file in a folder that can be written") from None


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """Read what `write_state` wrote.

    Returns:
        The state, not yet compared with a runtime, and the notes.

    Raises:
        InputError: no such file, or no such format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} is not a file; save a prefix there first")
    if others_can_change(path):
        raise InputError(
            f"{path} can be changed by every user of this machine; copy it into a folder of your own, and chmod o-w it"
        )
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(f"{path} is not a saved state, or is of another version; save the prefix again")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return _parse(header, tensors, str(path))
    except (SafetensorError, KeyProblem, *ERRORS) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({one_line(error)}); save the prefix again") from None


def _parse(header: dict[str, str], tensors: dict[str, NDArray[Any]], name: str) -> tuple[State, dict[str, Any]]:
    """The state and the notes in a file's header and tensors.

    Raises:
        KeyError, TypeError, ValueError, KeyProblem: they do not hold a state.
    """
    if header.pop(DIGEST, None) != _digest(header, tensors):
        raise ValueError("its bytes were changed")
    numbers = convert(parse(header["state"].encode()), _Numbers)
    notes = convert(parse(header["notes"].encode()), dict[str, Any])
    ids, first = tensors.pop(IDS), tensors.pop(FIRST, np.zeros(0, np.int32))
    for each in (ids, first):
        if each.ndim != 1 or each.dtype != np.int32:
            raise TypeError(f"ids are {each.dtype} {each.shape}")
    rows = {key.removeprefix("cache."): value for key, value in tensors.items()}
    return State(numbers.identity, numbers.position, numbers.written, ids, rows, numbers.pinned, first, name), notes


def _digest(header: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the sorted lines `key sha256` of a file's header and `name type shape sha256` of its tensors.

    The Kotlin library computes the same.
    """
    lines = [f"{key} {hashlib.sha256(text.encode()).hexdigest()}" for key, text in header.items()]
    for name, rows in tensors.items():
        dtype = f"{rows.dtype.kind}{8 * rows.dtype.itemsize}".upper()  # the name in safetensors: F32, I8
        shape = ",".join(map(str, rows.shape))
        lines.append(f"{name} {dtype} {shape} {hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
