"""The reader of files that others wrote: whatever lies in a file's place is read, or is refused in one line that names it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from campaigns.campaign import time_limit

from gemma_edge.errors import InputError
from gemma_edge.reading import MAX_DEPTH, MAX_JSON, parse_json, present, read_bytes, read_json, read_template, read_text


def sparse(path: Path) -> None:
    """Terabytes that take no space."""
    path.touch()
    os.truncate(path, 1 << 42)


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have 107 bytes
        server.bind(path.name)
        os.chdir(here)


IN_ITS_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "is a folder, not a regular file"),
    "a pipe": (os.mkfifo, "is a pipe, not a regular file"),
    "a socket": (listen, "is a socket, not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "a link that leads nowhere": (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
    "a circle of links": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    "terabytes": (sparse, f"has {1 << 42} bytes; at most"),
    "another encoding": (lambda path: path.write_text("{}", encoding="utf-16"), "UTF-8 at byte 0"),
}


@pytest.mark.parametrize("kind", IN_ITS_PLACE)
@pytest.mark.parametrize("read", [read_json, read_text, read_template])
def test_what_is_no_file_of_this_kind_is_refused_in_one_line(
    read: Callable[[Path, str], object], kind: str, tmp_path: Path
) -> None:
    put, words = IN_ITS_PLACE[kind]
    path = tmp_path / "config.json"
    put(path)
    with pytest.raises(InputError) as caught, time_limit(10):
        read(path, "download it again")
    message = str(caught.value)
    assert message.startswith(f"{path} ") and words in message and message.endswith("; download it again"), message
    assert "\n" not in message and present(path)


@pytest.mark.parametrize("name", ["no\0thing", "n" * 5000])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / name, "give another")
    assert not present(tmp_path / name)


def test_a_file_that_is_absent_is_named_by_its_folder_or_by_its_parameter(tmp_path: Path) -> None:
    assert not present(tmp_path / "config.json")
    with pytest.raises(InputError, match=f"{tmp_path} has no config.json; download it"):
        read_json(tmp_path / "config.json", "download it")
    with pytest.raises(InputError, match=f"recipe {tmp_path}/r does not exist; write one") as caught:
        read_json(tmp_path / "r", "write one", field="recipe")
    assert caught.value.field == "recipe" and caught.value.value == tmp_path / "r"


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_json_is_read_down_to_a_depth(opened: str) -> None:
    """json.loads raised RecursionError, and documents that it accepted raised it later."""
    closed = "]" if opened == "[" else "}"
    assert parse_json((opened * MAX_DEPTH + "1" + closed * MAX_DEPTH).encode())
    for depth in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(ValueError, match=f"nested more than {MAX_DEPTH} deep"):
            parse_json((opened * depth + "1" + closed * depth).encode())


@pytest.mark.parametrize("text", ['{"a": 1}{"a": 1}', '{"a"', "", "\0", "[1]", '"a"', "1" * 5000, '{"a": "\ufeff'])
def test_what_is_no_json_object_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not valid JSON|does not hold a JSON object") as caught:
        read_json(path, "download it")
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_read(tmp_path: Path) -> None:
    """Half a surrogate pair could not be printed, and msgspec raised UnicodeEncodeError for it."""
    path = tmp_path / "config.json"
    path.write_text('{"a": "\\ud83d\\ude42"}')
    assert read_json(path) == {"a": "🙂"}
    for text in ('{"a": "\\uD83D"}', '{"\\ude42": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match="holds half a surrogate pair"):
            read_json(path)


def test_a_byte_order_mark_is_refused_in_formats_and_left_out_of_texts(tmp_path: Path) -> None:
    """transformers refuses such a config.json, and Kotlin such a file of a bundle; Windows' editors begin a text with one."""
    path = tmp_path / "file"
    path.write_text("\ufeff{}\r\n\rx", encoding="utf-8", newline="")
    assert read_text(path, "") == "{}\n\nx"
    for read in (read_json, read_template):
        with pytest.raises(InputError, match="byte order mark; save it as UTF-8 without one"):
            read(path, "download it")


def test_a_large_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, "", max_bytes=100) == b"x" * 100
    with pytest.raises(InputError, match="has 100 bytes; at most 99 are read"):
        read_bytes(path, "", max_bytes=99)
    os.truncate(path, MAX_JSON + 1)
    with pytest.raises(InputError, match="at most"):
        read_json(path, "")
