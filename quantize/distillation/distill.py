"""Distillation of a quantized model on the original's logits. It trains what is float, scales and norms; codes stay as they are.

The loss is the one of Gemma 2's own training, KL(original || student) over every token (arXiv 2408.00118, section 3). It works on
any module whose linears are `CodedLinear`s; the caller builds that module and loads its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_edge.quantize.integers import QuantizedTensor, round_scale

Logits = Callable[[Tensor], Tensor]  # a window (1, T) int64 -> (1, T, V)


class _CodedProduct(torch.autograd.Function):
    """x W^T, where W = code * scale is made when it is needed, forward and backward, so that no float weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, scale)
        return F.linear(x, _weight(codes, scale))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        x, codes, scale = ctx.saved_tensors
        (grad,) = grads
        of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)  # (out, in)
        of_scale = (of_weight * codes).view(*scale.shape, -1).sum(-1)  # (out, groups)
        return grad @ _weight(codes, scale), None, of_scale


def _weight(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)


class CodedLinear(nn.Module):
    """A linear over integers. The logarithms of its scales are trained: scales stay positive, and every step is relative."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.register_buffer("start", tensor.scale.float())
        self.register_buffer("codes", tensor.codes)
        self.log_change = nn.Parameter(torch.zeros_like(self.get_buffer("start")))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        scale = self.get_buffer("start") * self.log_change.exp()
        out: Tensor = _CodedProduct.apply(x, self.get_buffer("codes"), scale)  # type: ignore[no-untyped-call]
        return out

    def result(self) -> QuantizedTensor:
        """The same codes with the trained scales, rounded as scales must be."""
        scale = round_scale(self.get_buffer("start") * self.log_change.detach().exp()).to(torch.bfloat16)
        return QuantizedTensor(self.tensor.codes, scale.cpu(), self.tensor.config)


@dataclass(frozen=True)
class Schedule:
    """How long the training runs, and how fast it learns."""

    epochs: int = 4
    learning_rate: float = 2e-3  # for the scales' logarithms and the norms; falls linearly to zero
    batch: int = 4  # windows per step
    held_out: int = 4  # windows that are not trained on, to judge the result
    seed: int = 0


def distill(
    student: Logits,
    teacher: Logits,
    parameters: Sequence[nn.Parameter],
    windows: Tensor,
    schedule: Schedule,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, float]:
    """Train the parameters in place. They end with the values that were best on the windows held out, possibly the first ones.

    Args:
        student: the model that depends on the parameters.
        teacher: the original model.
        windows: (N, T) int64; the last `held_out` are not trained on.
        progress: called with 1 per window trained on.

    Returns:
        KL per token on the windows held out, in nats: before and after.
    """
    train, held_out = windows[: -schedule.held_out], windows[-schedule.held_out :]
    optimizer = torch.optim.Adam(list(parameters), lr=schedule.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(schedule.seed)
    before = best = _mean_kl(student, teacher, held_out)
    kept = [parameter.detach().clone() for parameter in parameters]
    steps = schedule.epochs * -(-len(train) // schedule.batch)
    step = 0
    for _ in range(schedule.epochs):
        order = torch.randperm(len(train), generator=generator, device="cpu")
        for first in range(0, len(train), schedule.batch):
            batch = train[order[first : first + schedule.batch]]
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            for window in batch:
                (_kl(student, teacher, window[None]) / len(batch)).backward()  # type: ignore[no-untyped-call]
                progress(1)
            optimizer.step()
            step += 1
        kl = _mean_kl(student, teacher, held_out)
        if kl < best:
            best, kept = kl, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return before, best


def _kl(student: Logits, teacher: Logits, window: Tensor) -> Tensor:
    with torch.no_grad():
        expected = teacher(window).float().log_softmax(-1)
    result = student(window).float().log_softmax(-1)
    return (expected.exp() * (expected - result)).sum(-1).mean()


def _mean_kl(student: Logits, teacher: Logits, windows: Tensor) -> float:
    with torch.no_grad():
        return sum(float(_kl(student, teacher, window[None])) for window in windows) / len(windows)
