"""Reads files that somebody else wrote. A file that is not regular, or too large for its kind, is refused in one line.

A folder, a pipe, a device, or a link that leads nowhere is an error and does not count as an absent file; see `present`.
Formats that other programs read too (JSON, chat templates) may not begin with a byte order mark, because transformers, the
tokenizers library and Kotlin refuse it. From plain text it is removed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError, one_line

# The largest file of each kind, in bytes. Gemma 2's tokenizer.json has 17 MB, its tokenizer_config.json 47 kB.
MAX_JSON = 16 << 20
MAX_TOKENIZER = 256 << 20
MAX_TEMPLATE = 256 << 10
MAX_TEXT = 1 << 30
MAX_DEPTH = 100  # levels of nested lists and objects
GGUF_SUFFIX = ".gguf"
MODEL_HINT = "pass a Hugging Face model folder"
BOM = b"\xef\xbb\xbf"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_gguf(path: str | Path) -> bool:
    """Whether a file is a GGUF file, by its name."""
    return str(path).lower().endswith(GGUF_SUFFIX)


def present(path: Path) -> bool:
    """Whether something lies at a path, even something that cannot be read."""
    return os.path.lexists(path)


def check_regular(path: Path, hint: str, *, field: str | None = None) -> os.stat_result:
    """The status of a regular file, links followed.

    Args:
        path: the file.
        hint: what the error says to do.
        field: the parameter that names the file; None: it is one file of a folder.

    Raises:
        InputError: nothing is there, or something else than a regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if present(path):
            raise _refusal(path, "is a link that leads nowhere", hint, field) from None
        if field is None:
            raise InputError(f"{path.parent} has no {path.name}", hint=hint) from None
        raise _refusal(path, "does not exist", hint, field) from None
    except (OSError, ValueError) as error:  # a circle of links, a name that is too long, a NUL in it
        raise _refusal(path, f"cannot be read: {_reason(error)}", hint, field) from None
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise _refusal(path, f"is {kind}, not a regular file", hint, field)
    return status


def read_bytes(path: Path, hint: str, *, max_bytes: int, field: str | None = None) -> bytes:
    """A file's bytes.

    Args:
        path, hint, field: as in `check_regular`.
        max_bytes: how large it may be.

    Raises:
        InputError: as `check_regular`; also for a file that is too large or cannot be read.
    """
    size = check_regular(path, hint, field=field).st_size
    if size > max_bytes:
        raise _refusal(path, f"has {size} bytes; at most {max_bytes} are read", hint, field)
    try:
        with open(path, "rb", opener=_opener) as file:
            return file.read(size)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {_reason(error)}", hint, field) from None


def read_text(path: Path, hint: str, *, max_bytes: int = MAX_TEXT, field: str | None = None) -> str:
    """A plain text in UTF-8, without its byte order mark; line ends become newlines.

    Raises:
        InputError: as `read_bytes`; also for bytes that are not UTF-8.
    """
    return _decoded(path, read_bytes(path, hint, max_bytes=max_bytes, field=field).removeprefix(BOM), hint, field)


def read_template(path: Path, hint: str) -> str:
    """A chat template.

    Raises:
        InputError: as `read_text`; also for a byte order mark.
    """
    data = read_bytes(path, hint, max_bytes=MAX_TEMPLATE)
    if data.startswith(BOM):
        raise _refusal(path, "begins with a byte order mark; save it as UTF-8 without one", hint)
    return _decoded(path, data, hint)


def _decoded(path: Path, data: bytes, hint: str, field: str | None = None) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(path, f"is not UTF-8 at byte {error.start}", hint, field) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python's text files do


def read_json(path: Path, hint: str = MODEL_HINT, *, field: str | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path, hint, field: as in `check_regular`.

    Raises:
        InputError: as `read_bytes`; also for what is not a JSON object in UTF-8, or is nested too deep.
    """
    text = read_bytes(path, hint, max_bytes=MAX_JSON, field=field)
    try:
        data = parse_json(text)
        if b"\\ud" in text.lower():
            json.dumps(data, ensure_ascii=False).encode()  # raises an error for half a surrogate pair
    except UnicodeEncodeError:
        raise _refusal(path, "holds half a surrogate pair, which is not text", hint, field) from None
    except ValueError as error:
        raise _refusal(path, f"is not valid JSON: {one_line(error)}", hint, field) from None
    if not isinstance(data, dict):
        raise _refusal(path, "does not hold a JSON object", hint, field)
    return data


def parse_json(text: bytes, objects: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Plain values from JSON.

    Args:
        text: the document.
        objects: makes an object from its pairs; None makes a dict, in which the last of two equal keys counts.

    Raises:
        ValueError: it is not JSON in UTF-8 without a byte order mark, or nested more than MAX_DEPTH deep.
    """
    if text.startswith(BOM):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=objects)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for value in level if isinstance(value, dict | list) for inner in _inside(value)]
        if not level:
            return data
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _opener(path: str, flags: int) -> int:
    # without waiting: a pipe may have taken the file's place
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _refusal(path: Path, problem: str, hint: str, field: str | None = None) -> InputError:
    named = f"`{field}` {path}" if field else str(path)
    return InputError(f"{named} {problem}", field=field, value=path, hint=hint)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)
