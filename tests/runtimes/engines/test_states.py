"""Saved states that are damaged, hostile, or can be changed by others are refused by name before anything of them is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from support.toys import ToyRuntime, write_toy_bundle

from gemma_edge.errors import InputError
from gemma_edge.runtimes.cli import main
from gemma_edge.runtimes.engines import state as states
from gemma_edge.runtimes.engines.state import State, read_state, write_state
from gemma_edge.runtimes.generation.session import Session

STATE = State("a" * 64, 5, 5, np.arange(5, dtype=np.int32), {"0.key": np.ones((1, 2, 5, 4), np.float32)})
DEEP = "[" * 100_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_state(tmp_path / "state", STATE, {"prefix": "It was"})
    return tmp_path / "state"


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_state(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500
    return message


def rewrite(path: Path, **changes: str) -> None:
    """The same state with other texts in its header, and the hash that belongs to them."""
    header = {
        "format": states.FORMAT,
        "state": json.dumps({"identity": "a", "position": 5, "written": 5}),
        "notes": "{}",
        **changes,
    }
    tensors = load_file(path)
    save_file(tensors, path, {**header, states.DIGEST: states._digest(header, tensors)})


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.999])
def test_one_bit_anywhere_is_seen(part: float, path: Path) -> None:
    """A flipped bit in the cache's rows silently changed the answer."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * part)] ^= 1
    path.write_bytes(data)
    assert re.search("is damaged|of another version", refusal(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"notes": DEEP},
        {"state": DEEP},
        {"state": '{"identity": 5, "position": 5, "written": 5}'},
        {"state": '{"identity": "a", "position": 5.5, "written": 5}'},
        {"state": '{"identity": "a", "position": "5", "written": 5}'},
        {"state": "[]"},
        {"notes": "[]"},
        {"notes": '{"prefix": "\\ud800"}'},
    ],
)
def test_a_header_of_other_types_is_damaged(changes: dict[str, str], path: Path) -> None:
    """Some ended in a traceback, among them a RecursionError; others were accepted."""
    rewrite(path, **changes)
    assert "is damaged" in refusal(path)


def test_a_state_of_another_version_is_named(path: Path) -> None:
    rewrite(path, format="gemma-edge state 1")
    assert "of another version" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 1 << 40, "written": 1 << 40}, "position 1099511627776"),
        ({"position": -1}, "position -1"),
        ({"rows": {"0.key": np.full((1, 2, 5, 4), np.nan, np.float32)}}, "not finite"),
    ],
)
def test_what_an_engine_could_not_take_is_refused(changes: dict[str, Any], message: str) -> None:
    damaged = replace(STATE, **changes)
    with pytest.raises(InputError, match=message):
        damaged.check(STATE.identity, {name: (rows.shape, rows.dtype) for name, rows in damaged.rows.items()})


def anybody(path: Path) -> None:
    path.chmod(0o666)


def open_folder(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows does not tell who can write")
@pytest.mark.parametrize("let", [anybody, open_folder])
def test_a_state_that_every_user_can_change_is_refused(let: Callable[[Path], None], path: Path) -> None:
    let(path)
    assert "can be changed by every user" in refusal(path)
    path.chmod(0o600)
    path.parent.chmod(0o1777)  # as /tmp: others cannot change what is ours there
    assert read_state(path)[1] == {"prefix": "It was"}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "does not belong to this bundle"),
        ([{"messages": [], "ids": [10**6], "texts": []}], "does not belong to this bundle"),
        ([{"messages": [5], "ids": [], "texts": []}], "holds no conversation"),
        ([{"messages": [], "ids": ["5"], "texts": []}], "holds no conversation"),
    ],
)
def test_notes_that_are_no_conversation_leave_the_session_as_it_is(
    turns: list[Any], message: str, tmp_path: Path
) -> None:
    """A message of another type ended in a traceback in the next turn."""
    session = Session.open(write_toy_bundle(tmp_path / "bundle"), threads=1)
    "".join(session.send("Hello."))
    before = session.messages
    write_state(tmp_path / "state", session.runtime.snapshot(), {"said": turns, "before": ""})
    with pytest.raises(InputError, match=message):
        session.restore(tmp_path / "state")
    assert session.messages == before


@pytest.mark.parametrize("name", ["missing/state", "folder", "pipe", "x" * 300])
def test_a_prefix_that_could_not_be_written_is_refused_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path was refused only after the text had been computed, and a pipe or a device was replaced by a file."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    bundle = write_toy_bundle(tmp_path / "bundle")
    monkeypatch.setattr(ToyRuntime, "prefill", None)
    monkeypatch.setattr("gemma_edge.runtimes.engines.load.open_runtime", None)
    for words in (["prefix", str(bundle), "-o"], [str(bundle), "--save-prefix"]):
        result = CliRunner().invoke(main, [*words, str(tmp_path / name), "--prompt", "It was"])
        assert result.exit_code == 2, result.output
        assert "--save" in result.stderr and "no file can be written there" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


class Reachable(ToyRuntime):
    """A toy whose cache can be reached; it holds what was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = np.zeros((1, 100, 1), np.float32)

    def _buffers(self) -> dict[str, Any]:
        return {"fed": self.buffer}


def test_a_state_without_a_cache_is_fed_again() -> None:
    """As Kotlin saves it where a library cannot hand the cache out; it was refused as damaged."""
    ids = [9, 8, 9, 10, 11]
    runtime = Reachable()
    runtime.prefill(ids)
    state, expected = runtime.snapshot(), runtime.decode(12)
    assert state.rows and not runtime.stats.refed_tokens
    other = Reachable()
    other.prefill([30, 31])
    other.restore(replace(state, rows={}))
    assert other.position == 5 and other.stats.refed_tokens == 5
    assert np.array_equal(other.decode(12), expected)
    with pytest.raises(InputError, match="belongs to another bundle"):
        other.restore(replace(state, rows={}, identity="b" * 64))
