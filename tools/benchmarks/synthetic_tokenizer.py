"""A stand-in for Gemma's tokenizer: its special tokens, ids and vocabulary size, without its learned merges.

Any text survives encode and decode (characters it does not know become bytes), so exporters and runtimes accept it; it is
about four times as wordy as the real one. Written twice, as `tokenizer.json` and as a SentencePiece `tokenizer.model`
(llama.cpp reads only that), the latter straight in protobuf's wire format. Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>"}
FIRST_BYTE = 217  # <0x00>, as in Gemma 2
FIRST_CHARACTER = FIRST_BYTE + 256
CHARACTERS = "▁" + "".join(chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x250), *range(0x370, 0x530)))


@dataclass(frozen=True)
class Turns:
    """How a family writes conversations."""

    start: int  # id of <start_of_turn>; <end_of_turn> is the next one
    template: str

    @property
    def special(self) -> dict[int, str]:
        """Every special token by its id."""
        return {**SPECIAL, self.start: "<start_of_turn>", self.start + 1: "<end_of_turn>"}


GEMMA2 = Turns(
    106,
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
)
GEMMA3 = Turns(
    105,
    "{{ bos_token }}{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
)
# sentencepiece_model.proto, enum Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def pieces(vocab_size: int, turns: Turns) -> list[str]:
    """The token of every id: special, bytes, single characters, then fillers that no text contains."""
    tokens = [turns.special.get(i, f"<unused{i}>") for i in range(FIRST_BYTE)]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += list(CHARACTERS)
    tokens += [f"\ue000{i}" for i in range(len(tokens), vocab_size)]
    return tokens[:vocab_size]


def _hf(tokens: list[str], turns: Turns) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags, "special": True} for i, text in turns.special.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [],
        },
    }


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _kind(i: int) -> int:
    if i == 3:
        return UNKNOWN
    if i < 3:
        return CONTROL
    if i < FIRST_BYTE:
        return USER_DEFINED
    return BYTE if i < FIRST_CHARACTER else NORMAL


def _sentencepiece(tokens: list[str]) -> bytes:
    model = bytearray()
    for i, text in enumerate(tokens):
        score = _varint(2 << 3 | 5) + struct.pack("<f", float(-i if _kind(i) == NORMAL else 0))
        model += _message(1, _message(1, text.encode()) + score + _number(3, _kind(i)))
    # trainer_spec: model_type BPE, vocab_size, byte_fallback, then unk, bos, eos, pad ids
    trainer = _number(3, 2) + _number(4, len(tokens)) + _number(35, 1)
    trainer += _number(40, 3) + _number(41, 2) + _number(42, 1) + _number(43, 0)
    trainer += _message(45, b"<unk>") + _message(46, b"<bos>") + _message(47, b"<eos>") + _message(48, b"<pad>")
    # normalizer_spec: no dummy prefix, keep extra spaces, escape spaces as ▁
    normalizer = _message(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return bytes(model) + _message(2, trainer) + _message(3, normalizer)


def write_tokenizer(folder: Path, vocab_size: int, turns: Turns = GEMMA2) -> None:
    """Write tokenizer.json, tokenizer.model and tokenizer_config.json into `folder`."""
    tokens = pieces(vocab_size, turns)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{text.strip('<>')}_token": text for i, text in SPECIAL.items() if i < 4},
        "chat_template": turns.template,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    for name, data in (("tokenizer.json", _hf(tokens, turns)), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(_sentencepiece(tokens))
