"""Which tokens a text needs, and a tokenizer that knows only them.

Byte-pair encoding makes a token by merging two shorter ones. So with the tokens that a text becomes, every token on the way to
them is kept, and the text becomes the same tokens as before: of the merges that are gone, none was ever made in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from gemma_edge.errors import InputError
from gemma_edge.reading import read_text
from gemma_edge.text.tokenizer import BLANK, BYTE_TOKEN

AUTO = "auto:"
UNUSED = re.compile(r"<unused\d+>")  # added tokens that no model was trained on
PRINTABLE_ASCII = frozenset(map(chr, range(33, 127)))
# MULTIPLE: the number of tokens is filled up to a multiple of it, for the kernels; the tokens of lowest id are the most frequent
MULTIPLE = 64
MAX_TEXT = 1 << 30  # bytes of one file
SUFFIXES = (".txt", ".md")
HINT = f"pass a text file or a folder of {' and '.join(SUFFIXES)} files, or {AUTO} before it"


@dataclass(frozen=True)
class Kept:
    """The texts that decide which tokens are kept."""

    paths: tuple[Path, ...]
    by_characters: bool  # also keeps every token of printable ASCII and the texts' other characters

    @classmethod
    def parse(cls, vocab: str) -> Kept:
        """FILE or auto:FILE.

        Raises:
            InputError: there is no such file, or it is a folder without a text.
        """
        name = vocab.removeprefix(AUTO)
        path = Path(name)
        if not name or not path.exists():
            raise InputError(
                f"`vocab` {vocab}: there is no file {name or 'named'}", field="vocab", value=vocab, hint=HINT
            )
        paths = [path]
        if path.is_dir():
            paths = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
        if not paths:
            raise InputError(f"`vocab` {vocab} holds no text", field="vocab", value=vocab, hint=HINT)
        return cls(tuple(paths), vocab.startswith(AUTO))

    def texts(self) -> list[str]:
        """The contents of the files."""
        return [read_text(path, HINT, max_bytes=MAX_TEXT, field="vocab") for path in self.paths]


def kept_ids(
    data: Mapping[str, Any], texts: Iterable[str], rows: int, always: Iterable[int], *, by_characters: bool
) -> list[int]:
    """The tokens that are kept, by rising id.

    Args:
        data: a tokenizer.json whose model is BPE.
        texts: they become the same tokens as before.
        rows: of the model's table; tokens beyond it are none.
        always: tokens that are kept in any case.
        by_characters: also keep every token of printable ASCII and the texts' other characters.
    """
    vocab, merges = data["model"]["vocab"], Merges.of(data)
    names = {token: name for name, token in vocab.items()}
    added = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    keep = {*always, *(token for name, token in added.items() if not UNUSED.fullmatch(name))}
    keep |= {token for name, token in vocab.items() if BYTE_TOKEN.fullmatch(name)}
    keep |= {vocab[name] for name in [data["model"].get("unk_token")] if name in vocab}
    used: set[int] = set()
    characters = set(PRINTABLE_ASCII | {BLANK})
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    for text in texts:
        used.update(tokenizer.encode(text, add_special_tokens=False).ids)
        characters.update(text)
    for token in used - keep:
        keep.update(vocab[name] for name in merges.way_to(names[token]) if name in vocab)
    keep |= used
    if by_characters:
        keep |= {token for name, token in vocab.items() if characters.issuperset(name)}
    keep = {token for token in keep if token < rows}
    spare = [token for token in range(rows) if token in names and token not in keep]
    return sorted({*keep, *spare[: -len(keep) % MULTIPLE]})


@dataclass(frozen=True)
class Merges:
    """The merges of a tokenizer, by rank."""

    ranks: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Merges:
        """Those of a tokenizer.json."""
        return cls({pair: rank for rank, pair in enumerate(map(pair_of, data["model"]["merges"]))})

    def way_to(self, name: str) -> list[str]:
        """Every token that byte-pair encoding makes on the way to one, its characters and itself included."""
        parts, way = list(name), list(name)
        while len(parts) > 1:
            ranked = [
                (self.ranks[pair], i)
                for i, pair in enumerate(zip(parts, parts[1:], strict=False))
                if pair in self.ranks
            ]
            if not ranked:
                break
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            way.append(parts[at])
        return way


def pair_of(merge: str | list[str]) -> tuple[str, str]:
    """The two tokens of a merge, which older files join by a blank."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def rewritten(data: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """A tokenizer.json with some tokens alone, under new ids: merges that need another token are gone."""
    place = {token: index for index, token in enumerate(ids)}
    model = data["model"]
    vocab = {name: place[token] for name, token in model["vocab"].items() if token in place}
    merges = [merge for merge in model["merges"] if {*pair_of(merge), "".join(pair_of(merge))} <= vocab.keys()]
    added = [{**entry, "id": place[entry["id"]]} for entry in data["added_tokens"] if entry["id"] in place]
    names = {entry["content"] for entry in added}
    post = data.get("post_processor")
    if post and "special_tokens" in post:
        special = {
            name: {**entry, "ids": [place[token] for token in entry["ids"]]}
            for name, entry in post["special_tokens"].items()
            if name in names or name in vocab
        }
        post = {**post, "special_tokens": special}
    return {
        **data,
        "model": {**model, "vocab": vocab, "merges": merges},
        "added_tokens": added,
        "post_processor": post,
    }
