"""Tells how far a changed model is from the float one, on windows of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import torch
from quality_child import LINEAR
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

# WINDOW: how many positions of a window are judged.
WINDOW = 256


@dataclass(frozen=True)
class Made:
    """What quantizing took, and what came of it."""

    cpu_s: float  # CPU seconds
    weight_bits: float  # bits per weight of the linears, scales included
    table_bits: float = 8.0  # the same of the table; where it is left float, what it would cost in ours


@dataclass(frozen=True)
class Score:
    """One contender on the evaluation windows."""

    kl: float  # KL(float || quantized), nats per token
    top1: float  # share of positions with the float model's likeliest token
    ppl: float
    made: Made


def linears(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that contenders round, by name: (out, in)."""
    return {name: weight for name, weight in model.named_parameters() if LINEAR.fullmatch(name)}


class Judge:
    """The float model, and what it says about the evaluation windows."""

    def __init__(self, folder: Path, windows: Tensor) -> None:
        """Load the model.

        Args:
            folder: Hugging Face folder of a causal language model.
            windows: (N, WINDOW + 1) int64, BOS first.
        """
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in eval mode
        self.windows = windows
        self._original = {name: t.clone() for name, t in self.model.state_dict().items()}

    def restore(self) -> None:
        """Make the model the float one again."""
        self.model.load_state_dict(self._original)

    @cached_property
    def reference(self) -> list[Tensor]:
        """What enters the float model's head, (WINDOW, hidden) each. To be called before the model is changed."""
        return [self.model.model(window[None, :-1], use_cache=False)[0][0] for window in self.windows]

    def _log_probs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Log probabilities (WINDOW, V) of the float model and of the model as it is now."""
        head = {"weight": self._original["lm_head.weight"]}
        for window, hidden in zip(self.windows, self.reference, strict=True):
            logits: Tensor = self.model(window[None, :-1], use_cache=False).logits[0]
            right: Tensor = torch.func.functional_call(self.model.lm_head, head, hidden)
            yield right.float().log_softmax(-1), logits.float().log_softmax(-1)

    def score(self, made: Made) -> Score:
        """Compare the model as it is now with the float one."""
        kl = top1 = loss = 0.0
        for window, (right, said) in zip(self.windows, self._log_probs(), strict=True):
            kl += float((right.exp() * (right - said)).sum())
            top1 += float((right.argmax(-1) == said.argmax(-1)).sum())
            loss -= float(said.gather(1, window[1:, None]).sum())
        n = self.windows[:, 1:].numel()
        return Score(kl / n, top1 / n, math.exp(loss / n), made)


def cut(ids: Sequence[int], bos: int, *, count: int, length: int, seed: int | None = None) -> Tensor:
    """Cut windows from a text: one from each of `count` equal stretches, so that all parts of the text have the same share.

    Args:
        ids: the text's tokens.
        bos: the token that begins each window.
        count: how many windows.
        length: tokens of a window, BOS included.
        seed: for drawing the place within each stretch; None takes the beginning of the stretch.

    Returns:
        (count, length) int64.
    """
    stretch = len(ids) // count
    if stretch < length:
        raise click.ClickException(f"{len(ids)} tokens of text for {count} windows of {length}; ask for fewer windows")
    offsets = [0] * count
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(stretch - length + 1, (count,), generator=generator).tolist()
    starts = [i * stretch + offset for i, offset in enumerate(offsets)]
    return torch.tensor([[bos, *ids[start : start + length - 1]] for start in starts])
