"""Logits as every part of gemma-edge passes them on, and how many positions of them are computed at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
SCORED_BYTES = 1 << 25  # of logits in one call: twice as much is in memory meanwhile


def scored_at_once(prefill_chunk: int, vocab_size: int) -> int:
    """Positions in one chunk of `score_chunks`: a prefill chunk, or fewer where a large vocabulary makes their logits large."""
    return max(1, min(prefill_chunk, SCORED_BYTES // (4 * vocab_size)))
