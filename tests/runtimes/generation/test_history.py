"""Chats kept by name, and the line that they are typed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.toys import edit_json, write_toy_bundle

from gemma_edge.errors import InputError
from gemma_edge.runtimes.cli import main
from gemma_edge.runtimes.generation.history import VARIABLE, History, default_folder
from gemma_edge.runtimes.generation.line import make_session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("history") / "bundle")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data" / "chats"))
    return tmp_path / "data" / "chats"


def chat(bundle: Path, stdin: str, *args: str) -> Any:
    done = CliRunner().invoke(main, ["chat", str(bundle), "--threads", "1", "-n", "6", *args], input=stdin)
    return done


def test_a_chat_that_was_saved_goes_on_as_if_it_had_not_ended(bundle: Path, folder: Path) -> None:
    whole = chat(bundle, "Hello.\nWho?\nWhy?\n").stdout.splitlines()
    first = chat(bundle, "Hello.\n/save mine\nWho?\n/save\n")
    assert first.stdout.splitlines() == whole[: len(first.stdout.splitlines())]
    assert [path.name for path in folder.iterdir()] == ["mine.chat"]
    for again in (chat(bundle, "Why?\n", "--resume"), chat(bundle, "Why?\n", "--resume", "mine")):
        assert again.exit_code == 0 and again.stdout.splitlines() == whole[len(first.stdout.splitlines()) :]
        assert "mine: 4 messages" in again.stderr
    assert chat(bundle, "/load mine\nWhy?\n").stdout.splitlines() == whole[len(first.stdout.splitlines()) :]


def test_chats_are_listed_the_last_one_first_and_deleted(bundle: Path, folder: Path) -> None:
    import os

    assert chat(bundle, "Hello.\n/save one\n/save two\n").exit_code == 0
    os.utime(folder / "two.chat", (1, 1))
    listed = [line.split()[0] for line in chat(bundle, "/list\n").stderr.splitlines() if " saved " in line]
    assert listed == ["one", "two"] == [each.name for each in History().list()]
    assert "one is deleted" in chat(bundle, "/delete one\n").stderr and [each.name for each in History().list()] == [
        "two"
    ]
    assert "note: no chat is called one; supported: two" in chat(bundle, "/delete one\n").stderr


def test_a_wrong_name_is_refused_in_one_line(bundle: Path, folder: Path) -> None:
    for name in ("../x", ".hidden", "a/b"):
        done = chat(bundle, f"Hello.\n/save {name}\nWho?\n")
        assert done.exit_code == 0 and "a chat cannot be called" in done.stderr, "the chat goes on"
    assert not folder.exists() or not any(folder.iterdir())
    assert "a chat cannot be called ''" in chat(bundle, "Hello.\n/save\n").stderr
    for args, message in ((["--resume"], "no chat was saved in"), (["--resume", "x"], "no chat is called x")):
        done = chat(bundle, "Hello.\n", *args)
        assert done.exit_code == 2 and message in done.stderr and done.stdout == ""


def test_a_chat_of_another_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = write_toy_bundle(tmp_path / "other")
    edit_json(other / "tokenizer_config.json", model_max_length=7)
    assert chat(bundle, "Hello.\n/save mine\n").exit_code == 0
    done = chat(write_toy_bundle(tmp_path / "int8", dtype="int8"), "Who?\n", "--resume")
    assert done.exit_code == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_made_is_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "chats"))
    assert "no place to keep chats" in chat(bundle, "Hello.\n/save a\n").stderr


def test_chats_lie_with_the_users_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_folder() == Path("/data/gemma-edge/chats")
    with pytest.raises(InputError, match="no chat was saved"):
        History().load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("Hello.\r", "Hello."),
        ("\x1b[200~one\ntwo\r\nthree\x1b[201~ four\r", "one\ntwo\nthree four"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("Helo\x1b[Dl\r", "Hello"),
    ],
    ids=["typed", "pasted", "Alt-Enter", "edited"],
)
def test_a_line_can_be_edited_and_pasted_over_several_lines(typed: str, expected: str) -> None:
    pytest.importorskip("prompt_toolkit", reason="the package prompt_toolkit is not installed")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys:
        keys.send_text(typed)
        assert make_session(input=keys, output=DummyOutput()).prompt("> ") == expected
