"""The log-probabilities that a client may request with each token: of the model itself, before any sampling and schema."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredToken:
    """One token of a text and what else could have stood there."""

    text: bytes
    offset: int  # characters before it in the text
    logprob: float | None  # None for the first token of a prompt
    top: tuple[tuple[bytes, float], ...]  # the most likely tokens and their log-probabilities


class Recorder:
    """Collects the tokens of one choice as they come."""

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        """Begin with an empty text.

        Args:
            tokenizer: the bundle's.
            count: how many of the most likely tokens are kept with each token.
        """
        self._tokenizer, self._count = tokenizer, count
        self._offset = 0
        self._tokens: list[ScoredToken] = []

    def take(self) -> tuple[ScoredToken, ...]:
        """The tokens since the last call."""
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def add(self, token: int, logits: Logits | None) -> None:
        """Append a token and the logits (V,) that it was chosen by; None for the first token of a text."""
        text = self._tokenizer.token_bytes(token)
        logprob, top = None, list[tuple[bytes, float]]()
        if logits is not None:
            scores = logits.astype(np.float64)
            scores -= scores.max()
            scores -= np.log(np.exp(scores).sum())
            best = np.argpartition(-scores, self._count)[: self._count]
            best = best[np.argsort(-scores[best], kind="stable")]
            logprob = float(scores[token])
            top = [(self._tokenizer.token_bytes(int(each)), float(scores[each])) for each in best]
        self._tokens.append(ScoredToken(text, self._offset, logprob, tuple(top)))
        self._offset += len(self._tokenizer.decode([token]))  # special tokens are not part of the text

    def add_prompt(self, runtime: Runtime, ids: Sequence[int], cancelled: Callable[[], bool]) -> None:
        """Append the tokens of a prompt; the runtime is fed the whole prompt for that."""
        self.add(ids[0], None)
        done = 1
        for chunk in runtime.score_chunks(ids):
            for logits, token in zip(chunk, ids[done : done + len(chunk)], strict=False):
                self.add(token, logits)
            done += len(chunk)
            if cancelled():
                return
