"""Prompt lookup: guess the next tokens from what followed the last ones earlier in the text, and check all guesses in one call.

A guess counts only if it is the token that the sampler takes from the logits at its place, so what is generated is what the
logits say, sampled or greedy. It is token for token what plain decoding gives where the backend's kernels compute the same bits
for several tokens at once as one by one. Not all do, so that is looked at in every answer: see `Speculation`.
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
LONGEST, SHORTEST = 4, 2  # tokens that must have occurred before
MOST = 15  # guesses in one call
CHECKED = 6  # tokens computed in both ways
LONGEST_PAUSE = 64  # tokens without a guess, after many that were wrong


class Speculation:
    """Feeds tokens for `generate`, several at a time where guesses are at hand.

    EXACT: the first tokens of an answer are decoded one by one, taken back, and fed in one call. If any logit differs in any
    bit, they are fed one by one again, and this runtime is never used for guesses: the text is always that of plain decoding.
    CLOSE: without that check; where two tokens are nearly equally likely, the kernels' rounding may decide for the other one.
    """

    def __init__(self, runtime: Runtime, mode: str = EXACT, say: Callable[[str], None] = log.info) -> None:
        """Make the runtime ready for several tokens at once, which may load another graph.

        Args:
            runtime: stays the caller's.
            mode: of MODES.
            say: is told if the check finds a difference.
        """
        runtime.prepare_decode_many()
        self.runtime = runtime
        self.mode = mode
        self._say = say
        self.refused = False  # the kernels differ
        self.begin([])

    def begin(self, ids: Iterable[int]) -> None:
        """Start an answer to a text."""
        self._text = array("i", ids)
        self._ahead: list[tuple[int, Logits]] = []  # guesses that were fed, and the logits (V,) after each
        self._single: list[tuple[int, Logits]] = []  # decoded one by one, to be compared
        self._checked = self.mode == CLOSE or self.refused
        self._width, self._right, self._wrong, self._pause = 4, 0, 0, 0

    def decode(self, token: int) -> Logits:
        """Append one token; return the logits (V,) after it, which may have been computed already."""
        self._text.append(token)
        if self._ahead:
            guess, logits = self._ahead.pop(0)
            if guess == token:
                self.runtime.stats.accepted_tokens += 1
                self._right += 1
                if not self._ahead:
                    self._width, self._wrong = min(2 * self._width, MOST), 0
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
        """Rewind the guesses that were not used, and `wrong` more that were."""
        count = len(self._ahead) + wrong
        self._ahead = []
        if count:
            self.runtime.rewind(count)
        if wrong and self._right:
            self._width, self._wrong = self._right + 1, 0
        elif wrong:
            self._width, self._wrong = max(1, self._width // 2), self._wrong + 1
            self._pause = min(4**self._wrong, LONGEST_PAUSE)

    def _guess(self) -> list[int]:
        """What followed the last time, no more than can be taken back for free."""
        if self._pause:
            self._pause -= 1
            return []
        most = self.runtime.spare(self._width)
        if most < 1:
            return []
        text = np.frombuffer(self._text, np.int32)[-self.runtime.cache.context :]
        for size in range(LONGEST, SHORTEST - 1, -1):
            if len(text) <= size:
                continue
            # ends of earlier occurrences of the last `size` tokens
            ends = np.flatnonzero(text[size - 1 : -1] == text[-1]) + size
            for back in range(2, size + 1):
                ends = ends[text[ends - back] == text[-back]]
            if len(ends):
                # near the end of the text it repeats itself, else why would it occur again
                found: list[int] = np.resize(text[ends[-1] : ends[-1] + most], most).tolist()
                return found
        return []

    def _compare(self, token: int) -> Logits:
        """Decode one token plainly; with the last of CHECKED ones, see whether all at once gives the same bits."""
        runtime = self.runtime
        room = bool(self._single) or runtime.spare(CHECKED) == CHECKED
        logits = runtime.decode(token)
        if not room:
            return logits
        self._single.append((token, logits))
        if len(self._single) < CHECKED:
            return logits
        tokens = [token for token, _ in self._single]
        runtime.rewind(CHECKED)
        rows = runtime.decode_many(tokens)
        runtime.stats.decode_tokens -= CHECKED  # counted already
        self._checked = True
        if not all(np.array_equal(row, single) for row, (_, single) in zip(rows, self._single, strict=True)):
            self.refused = True
            self._say(
                "several tokens at once give other last bits here than one by one, so nothing is guessed;"
                " with --speculate=close it is, and a nearly equal choice may fall differently"
            )
            runtime.rewind(CHECKED)
            for again in tokens:
                runtime.decode(again)
            runtime.stats.decode_tokens -= CHECKED
        self._single = []
        return logits
