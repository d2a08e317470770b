"""A signature of a `.tflite` model: the exporter writes it, the engines read it."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_edge.bundle.ranges import Chunk, Name, Role, Tokens

# FIXED_COST: what a call costs beside its tokens, in tokens. Reading the weights takes as long as computing about 16 tokens.
FIXED_COST = 16
# Names of more signatures, in a model whose caches are variables
RESET = "reset"  # makes them
PIN = "pin"  # marks the first `pinned` tokens; only where the model keeps the beginning of a text


@dataclass(frozen=True)
class Signature:
    """A function of the model, for chunks of one size."""

    name: Name
    role: Role
    tokens: Chunk  # in one call
    longest: Tokens | None = None  # length of the longest text that it computes correctly; None: any length

    def is_right(self, position: int, tokens: int) -> bool:
        """Whether it sees the whole text after a call at `position`.

        Args:
            position: of the first token of the call.
            tokens: how many tokens wait; a call takes at most `self.tokens` of them.
        """
        return self.longest is None or position + min(tokens, self.tokens) <= self.longest

    def worth(self, tokens: int) -> tuple[float, bool]:
        """How quickly it works off the waiting tokens: the signature with the largest value is called.

        Args:
            tokens: how many tokens wait.

        Returns:
            tokens per unit of time, and whether it is for short texts only: of two equally quick signatures that one is quicker.
        """
        return min(tokens, self.tokens) / (self.tokens + FIXED_COST), self.longest is not None
