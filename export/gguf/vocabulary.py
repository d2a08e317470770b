"""A tokenizer.json as the vocabulary of a GGUF file: pieces, scores and types. The inverse of model/gguf/tokenizer.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.gguf.tokenizer import BYTE, CONTROL, NORMAL, TOKENS, UNKNOWN, UNUSED, USER_DEFINED
from gemma_edge.reading import MAX_TOKENIZER, parse_json, read_bytes
from gemma_edge.text.chat import template_of
from gemma_edge.text.tokenizer import BYTE_TOKEN, TOKENIZER_FILE, TOKENIZER_HINT

UNSCORED = -1000.0  # what llama.cpp's converter gives to a token that no merge makes


def text_metadata(folder: Path, config: GemmaConfig) -> dict[str, Any]:
    """The pairs that describe tokenizer, stop ids and chat template; the folder has a tokenizer.json.

    Raises:
        InputError: its tokenizer is of another kind than Gemma's, or a file cannot be read.
    """
    template, special = template_of(folder, TOKENIZER_HINT)
    pieces, scores, types = _vocabulary(folder / TOKENIZER_FILE, config.vocab_size, special.get("unk_token", "<unk>"))
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokens = {TOKENS[name]: ids[text] for name, text in special.items() if name in TOKENS and text in ids}
    stops = dict(zip(("eos", "eot"), config.eos_token_id, strict=False))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        **{
            f"tokenizer.ggml.{name}_token_id": index
            for name, index in {**tokens, "bos": config.bos_token_id, **stops}.items()
        },
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        **({"tokenizer.chat_template": template} if template else {}),
    }


def _vocabulary(path: Path, rows: int, unknown: str) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types, one of each for every row of the table.

    llama.cpp merges the pair whose piece has the best score, so the rank of a piece's first merge is its score.
    """
    raw = parse_json(read_bytes(path, TOKENIZER_HINT, max_bytes=MAX_TOKENIZER))
    model = raw.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise InputError(
            f"{path} is not byte-pair encoding with bytes for what it lacks, as Gemma's", hint=TOKENIZER_HINT
        )
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    ids = {index: piece for piece, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ", 1)), rank)
    pieces = [ids.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [_type(index, ids, added, unknown) for index in range(rows)]
    scores = [_score(piece, kind, ranks) for piece, kind in zip(pieces, types, strict=True)]
    return pieces, scores, types


def _type(index: int, ids: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], unknown: str) -> int:
    if index not in ids:
        return UNUSED
    if ids[index] == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    return BYTE if BYTE_TOKEN.fullmatch(ids[index]) else NORMAL


def _score(piece: str, kind: int, ranks: Mapping[str, int]) -> float:
    if kind == NORMAL:
        return -float(ranks.get(piece, len(ranks)))
    return 0.0 if kind == BYTE else UNSCORED
