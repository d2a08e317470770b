"""A runtime's state, as a value and as one safetensors file: the token ids, and the rows of the KV cache that are in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.errors import InputError
from gemma_edge.files import replacing

FORMAT = "gemma-edge state 1"
IDS = "ids"


@dataclass(frozen=True)
class State:
    """The state of one runtime at one moment."""

    identity: str  # hash of the bundle and the backend that it belongs to
    position: int  # tokens fed
    written: int  # highest position written with what the cache holds; more than `position` after a rewind
    ids: NDArray[np.int32]  # (N,), the last tokens fed
    rows: Mapping[str, NDArray[Any]]  # cache buffer -> (..., rows in use, head_dim)

    def check(self, identity: str, buffers: Mapping[str, NDArray[Any]]) -> None:
        """Compare with the runtime that is to go on from it.

        Args:
            identity: the runtime's identity.
            buffers: the rows that this state would fill.

        Raises:
            InputError: it belongs to another bundle or backend, or it is damaged.
        """
        if self.identity != identity:
            raise InputError(
                f"the state belongs to another bundle or backend ({self.identity[:16]}...; this one is"
                f" {identity[:16]}...); feed its text again"
            )
        actual = {name: (rows.shape, rows.dtype) for name, rows in self.rows.items()}
        expected = {name: (rows.shape, rows.dtype) for name, rows in buffers.items()}
        odd = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
        if odd:
            raise InputError(
                f"the state is damaged: {odd[0]} is {actual.get(odd[0])}, this bundle has {expected.get(odd[0])};"
                " make it again"
            )
        if not len(self.ids) <= self.position <= self.written or (self.position and not len(self.ids)):
            raise InputError(
                f"the state is damaged: {len(self.ids)} ids, position {self.position} of {self.written}; make it again"
            )


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

    numbers = {"identity": state.identity, "position": state.position, "written": state.written}
    header = {"format": FORMAT, "state": json.dumps(numbers), "notes": json.dumps(notes, ensure_ascii=False)}
    tensors = {IDS: state.ids, **{f"cache.{name}": rows for name, rows in state.rows.items()}}
    try:
        with replacing(path) as partial:
            save_file({name: np.ascontiguousarray(rows) for name, rows in tensors.items()}, partial, header)
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
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(f"{path} is not a saved state, or is of another version; save the prefix again")
            numbers, notes = json.loads(header["state"]), json.loads(header["notes"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        ids = tensors.pop(IDS)
        if ids.ndim != 1 or ids.dtype != np.int32:
            raise TypeError(f"ids are {ids.dtype} {ids.shape}")
        rows = {name.removeprefix("cache."): value for name, value in tensors.items()}
        state = State(str(numbers["identity"]), int(numbers["position"]), int(numbers["written"]), ids, rows)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}); save the prefix again") from None
    return state, dict(notes)
