"""The rows of global layers that keep the beginning of a text, as ONNX Runtime's attention reads them: in order, without a ring.

The first P rows belong to the first P tokens. Behind them the others follow in order; when a buffer is full, those that no query
needs any more are dropped, and the rest moves down behind the first P. GroupQueryAttention has no window here: a bias hides a row
that has left it. So the row of position p is p, or p less what was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.bundle.geometry import CacheGeometry

HIDDEN = -1e9  # added to the score of a row that must not count
MOVED_AT_ONCE = 256  # rows, so that a move takes little memory


class MovingRows:
    """The buffers of all layers that keep the beginning; they are written in step."""

    def __init__(self, cache: CacheGeometry, buffers: Mapping[str, NDArray[Any]]) -> None:
        """Take the buffers.

        Args:
            cache: their geometry.
            buffers: LAYER.key and LAYER.value -> (1, K, slots, D), of every layer.
        """
        keeping = {index: layer for index, layer in enumerate(cache.layers) if layer.pinned}
        layer = next(iter(keeping.values()))
        self._window, self._kept = layer.window, layer.pinned
        self._slots = min(each.slots for each in keeping.values())
        self._buffers = [rows for name, rows in buffers.items() if int(name.partition(".")[0]) in keeping]
        self._dropped = 0

    def clear(self) -> None:
        """Begin anew."""
        self._dropped = 0

    def make_room(self, position: int, tokens: int) -> int:
        """Move rows if that many tokens from `position` on do not fit behind the others; rows in use before them."""
        if position + tokens - self._dropped > self._slots:
            self._drop(position)
        return position - self._dropped

    def bias(self, position: int, tokens: int, pinned: int) -> NDArray[np.float32]:
        """What is added to the scores of that many queries from `position` on: (1, 1, T, rows in use after them)."""
        rows = position - self._dropped + tokens
        last = position + tokens - 1
        oldest = last - self._window + 1 - self._dropped  # the last query sees rows from here on
        if oldest <= pinned and not self._dropped:
            return np.zeros((1, 1, tokens, rows), np.float32)
        row = np.arange(rows)
        positions = np.where(row < self._kept, row, row + self._dropped)
        age = np.arange(position, position + tokens)[:, None] - positions  # (T, rows)
        hidden = (age >= self._window) & (row >= pinned)
        return np.where(hidden, np.float32(HIDDEN), np.float32(0))[None, None]

    def holds(self, position: int, written: int) -> bool:
        """Whether a text can go on at `position` after one was written up to `written`; see `Runtime._holds`."""
        if written - self._dropped > self._slots:
            return False  # rows move before that
        return not self._dropped or position - self._window + 1 >= self._dropped + self._kept

    def settle(self, position: int, written: int) -> None:
        """Drop as many rows as follows from the two numbers alone, for a copy of the buffers."""
        if written > self._slots:
            self._drop(position)

    def settled(self, position: int, written: int) -> None:
        """Take over the buffers of a copy."""
        self._dropped = self._needless(position) if written > self._slots else 0

    def _needless(self, position: int) -> int:
        """Rows behind the first that no query from `position` on sees."""
        return max(0, position - self._window + 1 - self._kept)

    def _drop(self, position: int) -> None:
        """Move the rows that queries from `position` on see to just behind the first ones."""
        by = self._needless(position) - self._dropped
        end = min(self._slots, position - self._dropped)  # rows from here on are not written
        for rows in self._buffers:
            for start in range(self._kept, end - by, MOVED_AT_ONCE):
                stop = min(start + MOVED_AT_ONCE, end - by)
                rows[:, :, start:stop] = rows[:, :, start + by : stop + by]
        self._dropped += by
