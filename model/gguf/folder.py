"""The Hugging Face folder of a GGUF file, in the user's cache: configuration, tokenizer and chat template.

The weights stay where they are. POINTER names their files, and Shards reads them, so every part of the program that takes a
folder takes a GGUF file: adapters, calibration, the gate. A copy as safetensors would take four bytes per weight on the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from gemma_edge import user_cache
from gemma_edge.errors import InputError
from gemma_edge.files import label, write_whole
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gguf.config import config_json
from gemma_edge.model.gguf.reader import HINT, Header, file_status, opened, read_header
from gemma_edge.model.gguf.tokenizer import text_files
from gemma_edge.reading import GGUF_SUFFIX, present, read_json

POINTER = "gguf.json"  # {"files": absolute paths}
KIND, TEXT = "gguf", "the tokenizer of a GGUF file"  # of the cache's folders, and what lies there
CONFIG = "config.json"
LAYOUT = 2  # of what is written: another number forgets older folders
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
MAX_PARTS = 999


def model_name(path: Path) -> str:
    """What a bundle made of the file is called after: its name without the ending and the part's number."""
    match = PART.fullmatch(path.name)
    return match[1] if match else path.name.removesuffix(GGUF_SUFFIX)


def prepare(path: Path) -> Path:
    """Make the folder of a GGUF file, or find the one made before.

    Args:
        path: the file; of a split one, any part.

    Raises:
        InputError: the file or one of its parts is missing, damaged or no Gemma, or there is no cache folder.
    """
    paths = parts(path)
    key = hashlib.sha256(json.dumps([LAYOUT, *((str(part), _status(part)) for part in paths)]).encode())
    name = f"{label(model_name(paths[0]))}-{key.hexdigest()[:32]}"
    if not present(_home() / name / CONFIG):  # it is written last
        headers = [read_header(part) for part in paths]
        _check_parts(paths, headers)
        _write(_cache(name), paths, headers)
    return _cache(name)


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made a folder. One that came from elsewhere may hold a file called POINTER too, and its author would
    choose which files of this machine are read: only in the user's own cache it means something.
    """
    return present(folder / POINTER) and folder.resolve().parent == _home().resolve()


def pointed(folder: Path) -> list[Path]:
    """The GGUF files of a prepared folder."""
    return [Path(name) for name in read_json(folder / POINTER)["files"]]


def parts(path: Path) -> list[Path]:
    """Every file of a model, by one of them. That they exist is checked when they are read.

    Raises:
        InputError: the file's name says that it is a part beyond the last.
    """
    path = path.absolute()
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= MAX_PARTS:
        raise InputError(f"{path}: part {int(match[2])} of {count}; at most {MAX_PARTS} are read", hint=HINT)
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}{GGUF_SUFFIX}") for number in range(1, count + 1)]


def _check_parts(paths: list[Path], headers: list[Header]) -> None:
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        count, own = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
        if (count, own) not in ((len(paths), number), (0, 0) if len(paths) == 1 else ()):
            raise InputError(
                f"{path} is part {own!r:.20} of {count!r:.20} by its metadata, but {number} of {len(paths)} by its name"
                " (the first is 0)",
                hint="give all parts the names they were published with: NAME-00001-of-0000N.gguf",
            )
    names = [name for header in headers for name in header.tensors]
    if len(set(names)) != len(names):
        raise InputError(f"{paths[0]}: two of its parts hold the same tensor", hint=HINT)


def _status(path: Path) -> tuple[int, ...]:
    with opened(path) as file:
        return file_status(file)


def _home() -> Path:
    """Where the prepared folders lie."""
    with user_cache.needed_for(TEXT):
        return user_cache.place(KIND)


def _cache(name: str) -> Path:
    """The folder of a name, which is made if it is not there."""
    with user_cache.needed_for(TEXT):
        return user_cache.folder(KIND, name)


def _write(folder: Path, paths: list[Path], headers: list[Header]) -> None:
    shapes = {name: place.shape for header in headers for name, place in header.tensors.items()}
    config = config_json(paths[0], headers[0], shapes)
    for name, text in text_files(paths[0], headers[0], config["vocab_size"]).items():
        write_whole(folder / name, text)
    write_whole(folder / POINTER, json.dumps({"files": list(map(str, paths))}))
    write_whole(folder / CONFIG, json.dumps(config, indent=1))
    try:
        GemmaConfig.from_hf(folder)
    except InputError as error:
        (folder / CONFIG).unlink()
        raise InputError(str(error).replace(str(folder / CONFIG), f"{paths[0]}, as a config.json")) from None
