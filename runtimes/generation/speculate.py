"""Prompt lookup: guess the next tokens from what followed the last ones earlier in the text, and check all guesses in one call.

A guess counts only if the sampler takes the same token from the logits at its place, so what is generated is what the logits
say, sampled or greedy. It is token for token the text of plain decoding if the backend's kernels compute the same bits for
several tokens at once as one by one. Some kernels do not, so every answer checks that: see `Speculation`.
Source of the idea: github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable

import numpy as np

from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime

log = logging.getLogger(__name__)

EXACT, CLOSE = "exact", "close"
MODES = (EXACT, CLOSE)
MAX_MATCH, MIN_MATCH = 4, 2  # how many of the last tokens must have occurred before
MAX_GUESSES = 15  # guesses in one call
CHECKED_TOKENS = 6  # tokens that are computed in both ways
MAX_PAUSE = 64  # tokens without a guess after many wrong guesses


class Speculation:
    """Feeds tokens for `generate`, several at a time where it has guesses.

    EXACT: the first tokens of an answer are decoded one by one, taken back, and fed in one call. If any logit differs in any
    bit, they are fed one by one again, and nothing is guessed with this runtime from then on: the text is always that of plain
    decoding. CLOSE: there is no check; if two tokens are nearly equally likely, rounding may choose the other one.
    """

    def __init__(self, runtime: Runtime, mode: str = EXACT, notify: Callable[[str], None] = log.info) -> None:
        """Make the runtime ready for several tokens at once, which may load another graph.

        Args:
            runtime: stays the caller's.
            mode: one of MODES.
            notify: called with one sentence if the check finds a difference.
        """
        runtime.prepare_decode_many()
        self.runtime = runtime
        self.mode = mode
        self._notify = notify
        self.refused = False  # whether the check found a difference
        self.begin([])

    def begin(self, ids: Iterable[int]) -> None:
        """Start an answer to the text `ids`."""
        self._text = array("i", ids)
        self._ahead: list[tuple[int, Logits]] = []  # guesses that were fed, each with the logits (V,) after it
        self._single: list[tuple[int, Logits]] = []  # tokens decoded one by one, for the check
        self._checked = self.mode == CLOSE or self.refused
        self._width, self._right, self._wrong, self._pause = 4, 0, 0, 0

    def decode(self, token: int) -> Logits:
        """Append one token; return the logits (V,) after it, which a guess may have computed already."""
        self._text.append(token)
        if self._ahead:
            guess, logits = self._ahead.pop(0)
            if guess == token:
                self.runtime.stats.accepted_tokens += 1
                self._right += 1
                if not self._ahead:
                    self._width, self._wrong = min(2 * self._width, MAX_GUESSES), 0
                return logits
            self.take_back(1)
        if not self._checked:
            return self._compare(token)
        guesses = [] if self.refused else self._guess()
        if not guesses:
            return self.runtime.decode(token)
        rows = self.runtime.decode_many([token, *guesses])
        self.runtime.stats.drafted_tokens += len(guesses)
        self._ahead, self._right = list(zip(guesses, rows[1:], strict=True)), 0
        first: Logits = rows[0]
        return first

    def take_back(self, wrong: int = 0) -> None:
        """Rewind the guesses that were not used, and `wrong` tokens more."""
        count = len(self._ahead) + wrong
        self._ahead = []
        if count:
            self.runtime.rewind(count)
        if wrong and self._right:
            self._width, self._wrong = self._right + 1, 0
        elif wrong:
            self._width, self._wrong = max(1, self._width // 2), self._wrong + 1
            self._pause = min(4**self._wrong, MAX_PAUSE)

    def _guess(self) -> list[int]:
        """The tokens that followed the last time, at most as many as can be taken back for free."""
        if self._pause:
            self._pause -= 1
            return []
        limit = self.runtime.spare(self._width)
        if limit < 1:
            return []
        text = np.frombuffer(self._text, np.int32)[-self.runtime.cache.context :]
        for size in range(MAX_MATCH, MIN_MATCH - 1, -1):
            if len(text) <= size:
                continue
            # ends of earlier occurrences of the last `size` tokens
            ends = np.flatnonzero(text[size - 1 : -1] == text[-1]) + size
            for back in range(2, size + 1):
                ends = ends[text[ends - back] == text[-back]]
            if len(ends):
                # A match near the end of the text has few tokens after it; the text is then likely to repeat them.
                guesses: list[int] = np.resize(text[ends[-1] : ends[-1] + limit], limit).tolist()
                return guesses
        return []

    def _compare(self, token: int) -> Logits:
        """Decode one token plainly; after CHECKED_TOKENS of them, check whether all at once give the same bits."""
        runtime = self.runtime
        room = bool(self._single) or runtime.spare(CHECKED_TOKENS) == CHECKED_TOKENS
        logits = runtime.decode(token)
        if not room:
            return logits
        self._single.append((token, logits))
        if len(self._single) < CHECKED_TOKENS:
            return logits
        tokens = [token for token, _ in self._single]
        runtime.rewind(CHECKED_TOKENS)
        rows = runtime.decode_many(tokens)
        runtime.stats.decode_tokens -= CHECKED_TOKENS  # counted already
        self._checked = True
        if not all(np.array_equal(row, single) for row, (_, single) in zip(rows, self._single, strict=True)):
            self.refused = True
            self._notify(
                "several tokens at once give other last bits here than one by one, so nothing is guessed;"
                " `speculate`=close guesses all the same, and a nearly equal choice may then fall differently"
            )
            runtime.rewind(CHECKED_TOKENS)
            for again in tokens:
                runtime.decode(again)
            runtime.stats.decode_tokens -= CHECKED_TOKENS
        self._single = []
        return logits
