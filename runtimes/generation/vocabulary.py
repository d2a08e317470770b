"""The bundle's tokens as llguidance reads them, for answers by a JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma_edge.errors import InputError
from gemma_edge.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# outside strings, the characters that lead to an end soonest: ends first; then short values, then what stands between values
ENDS = b"}],"
STARTS = b'1023456789"ntf[{-.e:'
QUOTE, BACKSLASH = b'"\\'


class Vocabulary:
    """The tokens of one bundle, made once for any number of schemas. Takes a second for 256,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Read the tokens.

        Args:
            tokenizer: the bundle's.
            vocab_size: V, the number of logits at a position; ids that the tokenizer does not have are never chosen.

        Raises:
            InputError: llguidance cannot read the tokenizer.
        """
        from llguidance import LLTokenizer

        self.stop_ids = frozenset(tokenizer.stop_ids)
        try:
            self.library: LLTokenizer = LLTokenizer(
                tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(self.stop_ids)
            )
        except ValueError as error:
            raise InputError(
                f"llguidance cannot read this bundle's tokenizer: {' '.join(str(error).split())}"
            ) from None
        self.vocab_size = vocab_size
        # printable ASCII without the backslash, which escapes the next character, and bytes that end other characters
        singles = (byte for byte in (*range(0x20, 0x7F), *range(0x80, 0xC0)) if byte != BACKSLASH)
        self.singles = [self.ids(bytes([byte]))[0] for byte in singles]
        self.ends, self.starts = ([self.ids(bytes([byte]))[0] for byte in text] for text in (ENDS, STARTS))
        self.quote = self.ids(b'"')[0]

    def ids(self, text: bytes) -> list[int]:
        """Tokens of a text."""
        return self.library.tokenize_bytes(text)

    def text(self, ids: Sequence[int]) -> bytes:
        """Text of tokens, without special tokens."""
        return self.library.decode_bytes(list(ids))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """(V,) bytes of each token, for filling a string; 0 for tokens that are not plain text."""
        texts = (self.text([token]) for token in range(self.vocab_size))
        return np.array([len(text) if BACKSLASH not in text else 0 for text in texts], np.int32)


def allowed_tokens(mask: bytes, vocab_size: int) -> NDArray[np.bool_]:
    """(V,) True for the tokens that may follow, from llguidance's bit mask."""
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
