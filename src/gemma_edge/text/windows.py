"""How a text is cut into windows and which of its tokens are scored: the protocols of published perplexities, as data.

Gemma without BOS gives perplexities in the thousands, so every window begins with it. Sources: transformers' documentation,
"Perplexity of fixed-length models"; llama.cpp, tools/perplexity/perplexity.cpp (`perplexity`, `process_logits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """A way to cut a token stream into windows of n_ctx."""

    name: str
    bos_replaces_a_token: (
        bool  # True: BOS overwrites a window's first token; False: n_ctx - 1 tokens of the text follow it
    )
    context_part: float  # the part of a window that only gives context and is not scored
    keeps_rest: bool  # True: the last window may be shorter; False: an incomplete window is dropped
    what: str  # the description that reports print


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("hf", False, 0.0, True, "disjoint windows, BOS in front of each, every token of the text scored once"),
        Protocol(
            "llama.cpp",
            True,
            0.5,
            False,
            "as llama-perplexity: BOS in place of a window's first token, second half scored",
        ),
    )
}
DEFAULT_WINDOW = 512
SMALLEST_WINDOW = 4  # the shortest window in which each protocol scores a token that has context


@dataclass(frozen=True)
class Window:
    """A sequence that is fed to a reset model. Positions `first` to T-2 are scored, each on the token that follows it."""

    ids: tuple[int, ...]  # (T,) BOS first
    first: int

    @property
    def scored(self) -> int:
        """The number of scored positions."""
        return len(self.ids) - 1 - self.first

    def targets(self, position: int, count: int) -> NDArray[np.int64]:
        """(count,) the tokens that follow `position` and the positions after it."""
        return np.array(self.ids[position + 1 : position + 1 + count], np.int64)


def cut(ids: Sequence[int], protocol: Protocol, *, bos: int, window: int) -> list[Window]:
    """Windows of at most `window` tokens, BOS included.

    Args:
        ids: the text's tokens, without BOS.
        protocol: one of PROTOCOLS.
        bos: the BOS id.
        window: n_ctx, at least SMALLEST_WINDOW.

    Raises:
        InputError: the text is too short for one window.
    """
    # llama.cpp tokenizes with BOS and overwrites each window's first token: in the first window that is BOS itself
    stream = [bos, *ids] if protocol.bos_replaces_a_token else list(ids)
    step = window if protocol.bos_replaces_a_token else window - 1
    first = int(window * protocol.context_part)
    windows = []
    for start in range(0, len(stream), step):
        part = stream[start : start + step]
        if len(part) < step and not protocol.keeps_rest:
            break
        windows.append(Window((bos, *(part[1:] if protocol.bos_replaces_a_token else part)), first))
    if not windows:
        needed = 1 if protocol.keeps_rest else step - 1
        raise InputError(
            f"a text of {len(ids)} tokens is too short: protocol {protocol.name} with windows of {window} needs {needed}",
            field="window",
            value=window,
            hint="give a longer text or a smaller `window`",
        )
    return windows
