"""Function-preserving channel scales that make a block easier to round (AWQ: Lin et al., arXiv 2306.00978).

Only scales that fold exactly into existing weights are used: pre-norm -> qkv, pre-norm -> gate and up, up -> down, v -> o. The
post-norms allow no others, and norms of queries and keys none between q and k. Nothing is left to compute at run time. The
norms' algebra: Gemma's RMSNorm multiplies by 1 + w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gemma_edge.quantize.calibration.gptq import Inputs, gptq, hscale, output_error
from gemma_edge.quantize.calibration.windows import Each, in_turn
from gemma_edge.quantize.integers import QuantizedTensor
from gemma_edge.quantize.recipe import QuantConfig

# EXPONENTS: pairs (a, b) of the candidates s = rms(x)^a / rms(W column)^b. A pair with a + b = 1 undoes any scale that the model
# has between the two.
EXPONENTS = ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0), (0.2, 0.0), (0.4, 0.0))
SILENT = 1e-5  # part of the mean channel below which a channel counts as silent
SAMPLED_ROWS = 256  # rows of each consumer that a candidate is judged on


@dataclass(frozen=True)
class Fold:
    """A place where a scale can be folded: the producer is divided by it, the consumers' columns are multiplied by it."""

    producer: str  # a norm, or a linear whose rows feed the consumers' columns
    consumers: tuple[str, ...]
    plus_one: bool = False  # the producer is a norm that multiplies by 1 + w
    repeat: int = 1  # v -> o: every value head feeds this many heads of o
    head_dim: int = 1  # v -> o: columns that are repeated together


def expand(scale: Tensor, fold: Fold) -> Tensor:
    """The scale of the producer's outputs (n,), repeated for the consumers' columns: (n * repeat,)."""
    return scale.view(-1, 1, fold.head_dim).expand(-1, fold.repeat, -1).flatten()


def apply_fold(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Move a scale (n,) from the producer to the consumers, in place. What the block computes stays the same."""
    weight = block.get_parameter(f"{fold.producer}.weight").data
    if fold.plus_one:
        weight.add_(1.0).div_(scale).sub_(1.0)
    elif weight.dim() == 1:
        weight.div_(scale)
    else:
        weight.div_(scale[:, None])
    columns = expand(scale, fold)
    for name in fold.consumers:
        block.get_parameter(f"{name}.weight").data.mul_(columns)


def candidates(block: nn.Module, fold: Fold, hessian: Tensor) -> list[Tensor]:
    """Scales worth trying, each (n,), geometric mean 1; the first is all ones."""
    weights = torch.cat([block.get_parameter(f"{name}.weight").data for name in fold.consumers])  # (out, in)
    shape = (-1, fold.repeat, fold.head_dim)
    seen = hessian.diagonal().view(shape).mean(1).flatten().sqrt()  # (n,) rms of the activations
    column = weights.square().mean(0).view(shape).mean(1).flatten().sqrt()  # (n,)
    # a silent channel gets no scale: it may become active later, and its weights would vanish beside the others'
    active = (seen > SILENT * seen.mean()) & (column > SILENT * column.mean())
    scales = [torch.ones_like(seen)]
    for a, b in EXPONENTS if active.any() else ():
        scale = seen**a / column**b
        scales.append(torch.where(active, scale / scale[active].log().mean().exp(), 1.0))
    return scales


def find_scale(
    block: nn.Module, fold: Fold, hessian: Tensor, configs: Sequence[QuantConfig], each: Each = in_turn
) -> Tensor:
    """The candidate under which GPTQ leaves the least output error, judged on a sample of the outputs.

    Args:
        hessian: (in, in) second moment of the consumers' inputs.
        configs: the integers of each consumer.
        each: tries the candidates.

    Returns:
        (n,): all ones if no other candidate is better.
    """
    samples = []
    for name in fold.consumers:
        weight = block.get_parameter(f"{name}.weight").data
        rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)]
        samples.append((rows.clone(), len(weight) / len(rows)))
    tried = candidates(block, fold, hessian)
    best, best_error = torch.empty(0), float("inf")
    for scale, error in zip(tried, each(partial(_error, fold, hessian, configs, samples), tried), strict=True):
        if error < best_error:
            best, best_error = scale, error
    return best


def _error(
    fold: Fold,
    hessian: Tensor,
    configs: Sequence[QuantConfig],
    samples: Sequence[tuple[Tensor, float]],
    scale: Tensor,
) -> float:
    """The output error that a candidate leaves.

    Args:
        samples: rows of each consumer, and how many rows each stands for.
        scale: the candidate, (n,).
    """
    columns = expand(scale, fold)
    inputs = Inputs.from_hessian(hessian / columns / columns[:, None])
    error = 0.0
    for (sample, share), config in zip(samples, configs, strict=True):
        rows = sample * columns
        step = hscale(rows, inputs, config)
        rounded = QuantizedTensor(gptq(rows, inputs, step, config), step.to(torch.bfloat16), config)
        error += share * float(output_error(rows, inputs, rounded.dequantize()).sum())
    return error
