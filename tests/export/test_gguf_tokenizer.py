"""A tokenizer that went through a GGUF file gives the ids that SentencePiece itself, or the original tokenizer.json, gives."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO, ROOT
from support.gguf_files import PIECES, write
from tokenizers import Tokenizer

from gemma_edge.model.gguf.folder import prepare
from gemma_edge.model.gguf.reader import Header
from gemma_edge.model.gguf.tokenizer import text_files

sentencepiece = pytest.importorskip("sentencepiece")
model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")

COUNT = 2000
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
ODD = (
    "", " ", "<", "   a", "a   ", "\t\t x\t", "\n\n\n", "a\r\nb", "\0", "\x7f\x01", "\ufeff\u200b\u00ad", "\u2581\u2581 x",
    "\ufffd", "e\u0301\u4f60\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "<0x41><0xFF>",
    "\u0e20\u0e32\u0e29\u0e32", "</s>",
)  # fmt: skip
RANGES = ((32, 127), (160, 0xD800), (0xE000, 0x20000), (0x20000, 0x110000), (0x1F300, 0x1FB00))


def texts(words: tuple[str, ...]) -> list[str]:
    """Lines of prose and of code, and for a third of them what nobody writes; `words` are strewn in."""
    draw = random.Random(0)
    files = [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "model").rglob("*.py"))]
    prose = [line for path in files for line in path.read_text().splitlines() if line]
    lines = [*draw.sample(prose, 2 * COUNT // 3), *ODD, *words]
    blanks = (" ", "  ", "\n", "\t", "the", ".", "a", " " * 17, "\n" * 9)
    while len(lines) < COUNT:
        characters = [chr(draw.randrange(*draw.choice(RANGES))) for _ in range(draw.randrange(1, 40))]
        spaced = draw.choices((*blanks, *words), k=draw.randrange(1, 40))
        line = draw.choice(prose)
        cut = draw.randrange(len(line))
        lines.append(draw.choice(("".join(characters), "".join(spaced), line[cut:] + characters[0] + line[:cut])))
    return lines


def metadata(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    """llama.cpp's keys, as its converter writes them: what is found before merges has the score -1000."""
    names = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    ids = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [-1000.0 if kind in (CONTROL, USER_DEFINED) else score for _, score, kind in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        **{f"tokenizer.ggml.{key}_token_id": names[piece] for key, piece in ids.items()},
    }


@cache
def demo_model() -> Any:
    """SentencePiece's file of the demo's tokenizer, as a message."""
    proto = model_pb2.ModelProto()
    proto.ParseFromString((DEMO / "tokenizer.model").read_bytes())
    return proto


def larger(size: int) -> Any:
    """The demo's tokenizer with runs of blanks that the user defined, as Gemma 3 has them, and joins of pairs of its pieces."""
    proto, draw = model_pb2.ModelProto(), random.Random(1)
    proto.CopyFrom(demo_model())
    pieces = {piece.piece: None for piece in proto.pieces}
    for length in range(2, 32):
        proto.pieces.add(piece="\u2581" * length, score=0.0, type=USER_DEFINED)
    pieces |= {piece.piece: None for piece in proto.pieces}
    words = [piece.piece for piece in proto.pieces if piece.type == NORMAL]
    score = min(piece.score for piece in proto.pieces)
    while len(proto.pieces) < size:
        joined = draw.choice(words) + draw.choice(words)
        if joined not in pieces and len(joined) < 24 and "\u2581" not in joined[1:]:
            pieces[joined] = None
            words.append(joined)
            score -= 1.0
            proto.pieces.add(piece=joined, score=score, type=NORMAL)
    return proto


def compare(ours: Tokenizer, proto: Any) -> None:
    """Ids of lines without control tokens, which SentencePiece takes as plain text, and without a run of its own sign for a
    blank: llama.cpp and transformers look for tokens of the user before blanks become that sign, SentencePiece afterwards.
    """
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    controls = [piece.piece for piece in proto.pieces if piece.type in (2, CONTROL)] + ["\u2581\u2581"]
    users = tuple(p.piece.replace("\u2581", " ") for p in proto.pieces if p.type == USER_DEFINED)
    lines = [line for line in texts(users[:40]) if not any(control in line for control in controls)]
    assert len(lines) >= COUNT - 5
    seen: set[int] = set()
    for line in lines:
        ids = ours.encode(line, add_special_tokens=False).ids
        assert ids == theirs.encode(line), line
        seen.update(ids)
    kinds = {proto.pieces[index].type for index in seen}
    assert kinds == {NORMAL, BYTE, *([USER_DEFINED] if users else [])}


def test_ids_are_those_of_sentencepiece() -> None:
    proto = demo_model()
    values = metadata([(piece.piece, piece.score, piece.type) for piece in proto.pieces])
    files = text_files(Path("model.gguf"), Header(values, {}, ()), len(proto.pieces))
    compare(Tokenizer.from_str(files["tokenizer.json"]), proto)


def test_ids_are_those_of_sentencepiece_with_many_pieces_and_runs_of_blanks(size: int = 20_000) -> None:
    proto = larger(size)
    values = metadata([(piece.piece, piece.score, piece.type) for piece in proto.pieces])
    files = text_files(Path("model.gguf"), Header(values, {}, ()), size)
    compare(Tokenizer.from_str(files["tokenizer.json"]), proto)


def test_ids_are_those_of_the_original_tokenizer_json(tmp_path: Path) -> None:
    """Through a whole file. Control tokens are found here, as in a chat."""
    folder = prepare(write(DEMO, tmp_path / "model.gguf"))
    ours, theirs = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (folder, DEMO))
    lines = texts(tuple(PIECES[:7]))
    assert len(lines) == COUNT
    for line in lines:
        assert ours.encode(line).ids == theirs.encode(line).ids, line
        assert ours.decode(ours.encode(line).ids) == theirs.decode(theirs.encode(line).ids), line
        pair = [each.encode(line, "b", add_special_tokens=True) for each in (ours, theirs)]
        assert pair[0].ids == pair[1].ids
