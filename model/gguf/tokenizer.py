"""A GGUF file's vocabulary as the tokenizer.json of a Hugging Face folder; no torch.

llama.cpp stores SentencePiece's pieces and scores. A BPE tokenizer needs the merges: a merge is a pair of pieces that join to a
piece, and the piece's score ranks it. Source: `generate_merges` and `GemmaConverter` in transformers, whose result is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.model.gguf.reader import HINT, Header
from gemma_edge.reading import MAX_TEMPLATE
from gemma_edge.text.chat import CONFIG_FILE, TEMPLATE_FILE
from gemma_edge.text.tokenizer import BLANK, TOKENIZER_FILE

MAX_PIECE = 256  # characters; the longest of Gemma 3's pieces has 93
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)  # they are found in a text before merges make the others
LISTS = {"tokens": str, "scores": float, "token_type": int}  # one element per token
# TOKENS: keys of tokenizer_config.json, and llama.cpp's for the same token
TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def text_files(path: Path, header: Header, rows: int) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and the chat template, if there is one: name -> text.

    Args:
        path: the file, for messages.
        header: its metadata.
        rows: of the model's table.

    Raises:
        InputError: a part of the vocabulary is missing or damaged, or it is of another kind.
    """
    metadata = header.metadata
    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise InputError(f"{path}: tokenizer.ggml.model is {model!r:.40}; supported: 'llama', which is Gemma's")
    pieces, scores, types = _vocabulary(path, metadata)
    if len(pieces) > rows:
        raise InputError(f"{path} has {len(pieces)} tokens, but its table has {rows} rows", hint=HINT)
    found = {key: _piece(path, metadata, pieces, name) for key, name in TOKENS.items()}
    named = {key: piece for key, piece in found.items() if piece is not None}
    files = {
        TOKENIZER_FILE: json.dumps(_tokenizer(pieces, scores, types, named), ensure_ascii=False),
        CONFIG_FILE: json.dumps({"tokenizer_class": "GemmaTokenizer", **named}, ensure_ascii=False),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str) or len(template.encode()) > MAX_TEMPLATE:
            raise InputError(
                f"{path}: tokenizer.chat_template is not a text of at most {MAX_TEMPLATE} bytes", hint=HINT
            )
        files[TEMPLATE_FILE] = template
    return files


def _vocabulary(path: Path, metadata: Mapping[str, Any]) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types."""
    pieces, scores, types = (_list(path, metadata, f"tokenizer.ggml.{key}", kind) for key, kind in LISTS.items())
    if not len(pieces) == len(scores) == len(types):
        counts = f"{len(pieces)} tokens, {len(scores)} scores and {len(types)} types"
        raise InputError(f"{path}: its tokenizer has {counts}", hint=HINT)
    known = set(pieces)
    if len(known) != len(pieces) or not all(0 < len(piece) <= MAX_PIECE for piece in pieces):
        raise InputError(f"{path}: a token stands twice, is empty or longer than {MAX_PIECE} characters", hint=HINT)
    missing = next((byte for byte in map("<0x{:02X}>".format, range(256)) if byte not in known), None)
    if missing is not None:
        raise InputError(f"{path} has no token for the byte {missing}", hint=HINT)
    if not all(map(math.isfinite, scores)):
        raise InputError(f"{path}: a token's score is NaN or infinite", hint=HINT)
    return pieces, scores, types


def _list(path: Path, metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise InputError(f"{path} has no {key}, or of another type", hint=HINT)
    return values


def _piece(path: Path, metadata: Mapping[str, Any], pieces: Sequence[str], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata.get(key)
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(pieces):
        raise InputError(f"{path}: {key} is {index!r:.40}, but there are {len(pieces)} tokens", hint=HINT)
    return pieces[index]


def merges(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every pair of pieces that join to a piece, the best first.

    What the user defined comes before all scores, as in SentencePiece, which never merges it with anything. llama.cpp stores
    the score -1000 for it. Gemma's runs of blanks are such pieces.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    found = []
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        rank = math.inf if kind in ADDED else score
        pairs = [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids
        ]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(rank, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda pair: pair[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _tokenizer(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], named: Mapping[str, str]
) -> dict[str, Any]:
    """Gemma's tokenizer.json: blanks become BLANK, and what is in no piece becomes bytes."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": index, "content": piece, **flags, "special": kind != USER_DEFINED}
        for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in ADDED
    ]
    bos = named.get("bos_token", "<bos>")
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos in pieces else []
    tokens = {bos: {"id": bos, "ids": [pieces.index(bos)], "tokens": [bos]}} if start else {}
    text = {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": text, "content": BLANK},
        "pre_tokenizer": {"type": "Split", "pattern": text, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                *start,
                {"Sequence": {"id": "A", "type_id": 0}},
                *[{"SpecialToken": {"id": bos, "type_id": 1}} for _ in start],
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": tokens,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": named.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges(pieces, scores, types),
        },
    }
