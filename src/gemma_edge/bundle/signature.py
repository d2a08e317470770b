"""A signature of a `.tflite` model: what the exporter writes and the engines read."""

from __future__ import annotations

from dataclasses import dataclass

FIXED_COST = 16  # of a call, in tokens: reading the weights takes as long as computing about that many tokens
RESET = "reset"  # signature of a model whose caches are variables: makes them


@dataclass(frozen=True)
class Signature:
    """A function of the model."""

    name: str
    role: str  # prefill, score or decode
    tokens: int  # in one call
    longest: int | None = None  # text that it is right for, as it looks at so many slots; None: any

    def to_json(self) -> list[str | int | None]:
        """What the manifest says of it, under its name."""
        return [self.role, self.tokens, self.longest]

    def is_right(self, position: int, tokens: int) -> bool:
        """Whether it sees all of a text that so many tokens, or as many as it takes, continue at a position."""
        return self.longest is None or position + min(tokens, self.tokens) <= self.longest

    def worth(self, tokens: int) -> tuple[float, bool]:
        """The more, the less time a token takes when so many wait; of two sizes alike, the one for short texts."""
        return min(tokens, self.tokens) / (self.tokens + FIXED_COST), self.longest is not None
