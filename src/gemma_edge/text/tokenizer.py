"""Text to token ids and back, from the bundle's tokenizer.json. What a conversation looks like is chat.py's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

from gemma_edge.bundle.manifest import Manifest, confined
from gemma_edge.errors import InputError
from gemma_edge.reading import MAX_TOKENIZER, read_bytes

TOKENIZER_FILE = "tokenizer.json"
END_OF_TURN = "<end_of_turn>"
STOPS = (END_OF_TURN, "<start_function_response>")  # FunctionGemma ends its calls with the second one
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # the name of a token that stands for one byte
BLANK = "\u2581"  # stands for a blank in the names of tokens
TOKENIZER_HINT = "take the tokenizer.json that belongs to the model"


def open_tokenizer(path: Path, hint: str) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Args:
        path: the file.
        hint: ends the message of an error.

    Raises:
        InputError: the file is not a tokenizer.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(path, hint, max_bytes=MAX_TOKENIZER))
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  (the library raises bare Exception for a file it cannot read)
        raise InputError(f"{path} is not a tokenizer ({error})", hint=hint) from None
    # training may have left both in the file; they are wrong for generation
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def parse_ids(text: str) -> list[int]:
    """Token ids from a text such as 2,15,7, the prompt of a token-level bundle.

    Raises:
        InputError: the text holds something else.
    """
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(
            f"prompt {text[:40]!r} is not a list of token ids",
            field="prompt",
            value=text,
            hint="give ids such as 2,15,7",
        ) from None


class TokenIds(Protocol):
    """The part of a model's configuration that a tokenizer needs."""

    @property
    def bos_token_id(self) -> int:
        """The first token of every text."""

    @property
    def eos_token_id(self) -> Sequence[int]:
        """The tokens that end a text."""


class Tokenizer:
    """The bundle's tokenizer."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        """Load it.

        Raises:
            InputError: the bundle is token-level, or its file is not a tokenizer.
        """
        if not manifest.tokenizer:
            raise InputError(f"{bundle} is a token-level bundle, without a tokenizer: give token ids instead of text")
        self._take(open_tokenizer(confined(bundle, TOKENIZER_FILE), "export the bundle again"), manifest.config)

    @classmethod
    def of_folder(cls, folder: Path, config: TokenIds) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, with its configuration."""
        tokenizer = cls.__new__(cls)
        tokenizer._take(open_tokenizer(folder / TOKENIZER_FILE, "download the folder again"), config)
        return tokenizer

    def _take(self, tokenizer: tokenizers.Tokenizer, config: TokenIds) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = config.bos_token_id
        found = (self._tokenizer.token_to_id(name) for name in STOPS)
        self.stop_ids = frozenset({*config.eos_token_id, *(token for token in found if token is not None)})

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it, such as <start_of_turn>, become their ids.

        Args:
            text: any text.
            bos: True begins with the BOS id, unless the text itself begins with <bos>; False adds nothing.

        Raises:
            InputError: the text holds bytes that are not UTF-8 (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid UTF-8 at character {error.start}; give UTF-8 text") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_token_id, *ids] if bos and ids[:1] != [self.bos_token_id] else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        """The id of the token with this name; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for: for a special token its name, for an id without a token nothing."""
        name = self._tokenizer.id_to_token(token) or ""
        byte = BYTE_TOKEN.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace(BLANK, " ").encode()

    def to_json(self) -> str:
        """The tokenizer.json, without truncation and padding."""
        return str(self._tokenizer.to_str())

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of tokens as they come, piece by piece.

        A character that takes several byte tokens comes as a whole; if the ids end inside a character, it is dropped. Otherwise
        the joined pieces equal `decode(ids)`, with one exception: for bytes that are not UTF-8 `decode` changes the text before
        them, while here that text stays and a U+FFFD stands for each byte after it.
        """
        stream, waiting = DecodeStream(skip_special_tokens=True), 0  # waiting: byte tokens since the last piece
        for token in ids:
            try:
                piece = stream.step(self._tokenizer, token)
            except Exception:  # noqa: BLE001  (the library raises bare Exception)
                stream = DecodeStream(skip_special_tokens=True)
                piece = "\ufffd" * waiting + (stream.step(self._tokenizer, token) or "")
            if piece is not None:
                waiting = 0
                yield piece
            elif BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or ""):
                waiting += 1
