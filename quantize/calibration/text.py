"""Calibration text: a file, a folder, JSON lines or the set shipped here, tokenized and cut into windows that begin with BOS.

What a pass makes of the windows is quantize/calibration/layerwise.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.quantize.options import CalibrationText
from gemma_edge.reading import MAX_JSON, check_regular, parse_json
from gemma_edge.text import corpus
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import TOKENIZER_FILE, TOKENIZER_HINT, open_tokenizer

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".jsonl")
TEXT_HINT = "give a text file, a folder or JSON lines"
WINDOW = 512  # tokens; a shorter context takes its own length
MIN_TOKENS = 256  # second moments of fewer say nothing
RARE = (
    0.25  # part of the tokens that are single bytes or unknown, from which on the text is hardly the model's language
)
CHAT_CHARACTERS = 400  # of plain text that make one turn


def windows(folder: Path, bos: int, max_length: int, source: CalibrationText) -> Tensor:
    """Cut windows from the text, equally many from each file. Only the beginning of a long file is read.

    Args:
        folder: the model's folder, for its tokenizer and chat template.
        bos: token that begins each window; without it a Gemma model computes something else.
        max_length: most tokens that the model takes.
        source: the text.

    Returns:
        (N, T) int64; fewer tokens than requested where the text is short.

    Raises:
        InputError: no tokenizer, a file that cannot be read, or too little text.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(
            f"{folder} has no {TOKENIZER_FILE}, so no text to calibrate on: pass `method` mse, or rtn", field="method"
        )
    tokenizer = open_tokenizer(folder / TOKENIZER_FILE, TOKENIZER_HINT)
    texts = list(_texts(source, ChatTemplate.of_folder(folder)))
    # a chat template may write BOS in the middle of a text, where the model never sees it in use
    ids = [[i for i in tokenizer.encode(text, add_special_tokens=False).ids if i != bos] for text in texts]
    total = sum(map(len, ids))
    if total < MIN_TOKENS:
        raise InputError(
            f"the calibration text has {total} tokens; at least {MIN_TOKENS} are needed: give more text as"
            " `calibration_text`",
            field="calibration_text",
            value=source.paths,
        )
    _warn_of_other_language(tokenizer, ids)
    length = min(WINDOW, max_length, total, max(MIN_TOKENS, source.tokens))
    cut = _cut(ids, bos, length, max(1, source.tokens // length), source.seed)
    if cut.numel() < source.tokens // 2:
        logger.warning(
            "only %d of %d tokens of calibration text: more text would serve better", cut.numel(), source.tokens
        )
    return cut


def _cut(ids: Sequence[Sequence[int]], bos: int, length: int, count: int, seed: int) -> Tensor:
    """`count` windows without overlap. The files take turns; files that are shorter than a window are joined."""
    short = [token for file in ids if len(file) < length - 1 for token in file]
    files = [file for file in (*ids, short) if len(file) >= length - 1]
    generator = torch.Generator().manual_seed(seed)
    stretches = []
    for file in files:
        starts = torch.randperm(len(file) // (length - 1), generator=generator) * (length - 1)
        stretches.append([[bos, *file[start : start + length - 1]] for start in starts.tolist()])
    drawn: list[list[int]] = []
    for turn in range(max(map(len, stretches))):
        drawn += [stretch[turn] for stretch in stretches if turn < len(stretch)]
    return torch.tensor(drawn[:count])


def _texts(source: CalibrationText, template: ChatTemplate) -> Iterator[str]:
    plain: list[str] = []
    max_characters = corpus.CHARACTERS_PER_TOKEN * source.tokens
    if not source.paths:
        plain = [corpus.read(name) for name in corpus.CALIBRATION]
    for path in source.paths:
        for file in _files(path):
            if file.suffix == ".jsonl":
                yield "\n".join(_line(line, file, number, template) for number, line in _lines(file, max_characters))
            else:
                with _opened(file) as opened:
                    plain.append(opened.read(max_characters))
    for text in plain:
        yield _as_chat(text, template) if source.chat else text


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise InputError(
            f"`calibration_text` {path} holds no {', '.join(SUFFIXES)} file; {TEXT_HINT}",
            field="calibration_text",
            value=path,
        )
    return files


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    check_regular(file, TEXT_HINT, field="calibration_text")
    try:
        with file.open(encoding="utf-8-sig") as opened:
            yield opened
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"`calibration_text` {file} cannot be read as UTF-8 text ({error})", field="calibration_text", value=file
        ) from None


def _lines(file: Path, max_characters: int) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers, until `max_characters` are read."""
    with _opened(file) as opened:
        for number, line in enumerate(iter(lambda: opened.readline(MAX_JSON + 1), ""), 1):
            if len(line) > MAX_JSON:
                raise InputError(f"{file}:{number} is longer than {MAX_JSON} characters; {TEXT_HINT}")
            if line.strip():
                yield number, line
            max_characters -= len(line)
            if max_characters <= 0:
                return


def _line(line: str, file: Path, number: int, template: ChatTemplate) -> str:
    """One JSON line: {"text": ...}, or {"messages": [{"role", "content"}, ...]} in the model's chat format."""
    try:
        data: dict[str, Any] = parse_json(line.encode())
        if "messages" in data:
            return template.render(data["messages"], add_generation_prompt=False)
        if not isinstance(data["text"], str):
            raise TypeError(f"its text is a {type(data['text']).__name__}")
        return data["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file}:{number} is no {{"text": ...}} or {{"messages": [...]}} ({error})') from None


def _as_chat(text: str, template: ChatTemplate) -> str:
    """Plain text as the turns of a conversation, cut into pieces of CHAT_CHARACTERS."""
    turns = [text[start : start + CHAT_CHARACTERS] for start in range(0, len(text), CHAT_CHARACTERS)]
    return "".join(
        template.render(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            add_generation_prompt=False,
        )
        for question, answer in zip(turns[::2], turns[1::2], strict=False)
    )


def _warn_of_other_language(tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> None:
    vocabulary = tokenizer.get_vocab()
    rare = {index for token, index in vocabulary.items() if token == "<unk>" or token.startswith("<0x")}
    count, total = sum(token in rare for file in ids for token in file), sum(map(len, ids))
    if count > RARE * total:
        logger.warning(
            "%.0f %% of the calibration text is spelled in single bytes: is it in a language of this model?",
            100 * count / total,
        )
