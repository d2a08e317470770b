"""A signature of a `.tflite` model: the exporter writes it, the engines read it."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_edge.bundle.ranges import Chunk, Name, Role, Tokens

FIXED_COST = 16  # cost of a call, in tokens: reading the weights takes as long as computing about that many tokens
RESET = "reset"  # signature that makes the caches, in a model whose caches are variables


@dataclass(frozen=True)
class Signature:
    """A function of the model."""

    name: Name
    role: Role
    tokens: Chunk  # in one call
    longest: Tokens | None = None  # longest text that it computes correctly, in tokens; None: any length

    def is_right(self, position: int, tokens: int) -> bool:
        """Whether it sees the whole text when it takes up to `tokens` tokens at `position`."""
        return self.longest is None or position + min(tokens, self.tokens) <= self.longest

    def worth(self, tokens: int) -> tuple[float, bool]:
        """How well it suits `tokens` tokens that wait: the larger, the less time each takes.

        Of two signatures of one size, the one for short texts suits better.
        """
        return min(tokens, self.tokens) / (self.tokens + FIXED_COST), self.longest is not None
