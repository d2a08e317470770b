"""Function-preserving channel scales that make a block easier to round (AWQ: Lin et al., arXiv 2306.00978).

Only scales that fold exactly into what is there: pre-norm -> qkv, pre-norm -> gate and up, up -> down, v -> o. The post-norms
allow no more, and nothing is left to compute at run time. Source of the norm's algebra: Gemma's RMSNorm multiplies by 1 + w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma_edge.quantize.calibration.gptq import Inputs, gptq, hscale, output_error
from gemma_edge.quantize.integers import QuantizedTensor
from gemma_edge.quantize.recipe import QuantConfig

# s = rms(x)^a / rms(W column)^b. With a + b = 1 a scale that somebody else has put between the two is undone, whatever it was.
EXPONENTS = ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0), (0.2, 0.0), (0.4, 0.0))
SILENT = 1e-5  # times the mean channel
SAMPLED_ROWS = 256  # of the consumers' outputs that a candidate is judged on


@dataclass(frozen=True)
class Fold:
    """One place where a scale can go: divided out of the producer, multiplied into the consumers' columns."""

    producer: str  # a norm, or a linear whose rows feed the consumers' columns
    consumers: tuple[str, ...]
    plus_one: bool = False  # the producer is a norm that multiplies by 1 + w
    repeat: int = 1  # v -> o: every value head feeds this many heads of o
    head_dim: int = 1  # v -> o: columns that are repeated together


def expand(scale: Tensor, fold: Fold) -> Tensor:
    """The scale of the producer's outputs (n,) as that of the consumers' columns (n * repeat,)."""
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
    # a channel that was silent may speak later: no scale for it, else its weights would vanish beside the others'
    heard = (seen > SILENT * seen.mean()) & (column > SILENT * column.mean())
    found = [torch.ones_like(seen)]
    for a, b in EXPONENTS if heard.any() else ():
        scale = seen**a / column**b
        found.append(torch.where(heard, scale / scale[heard].log().mean().exp(), 1.0))
    return found


def find_scale(block: nn.Module, fold: Fold, hessian: Tensor, configs: Sequence[QuantConfig]) -> Tensor:
    """The candidate under which GPTQ leaves the least output error, judged on a sample of the outputs.

    Args:
        hessian: (in, in) second moment of the consumers' inputs.
        configs: of each consumer.

    Returns:
        (n,): all ones where nothing helps.
    """
    best, best_error = torch.empty(0), float("inf")
    for scale in candidates(block, fold, hessian):
        columns = expand(scale, fold)
        inputs = Inputs.from_hessian(hessian / columns / columns[:, None])
        error = 0.0
        for name, config in zip(fold.consumers, configs, strict=True):
            weight = block.get_parameter(f"{name}.weight").data
            rows = weight[:: max(1, len(weight) // SAMPLED_ROWS)] * columns
            step = hscale(rows, inputs, config)
            found = QuantizedTensor(gptq(rows, inputs, step, config), step.to(torch.bfloat16), config)
            share = len(weight) / len(rows)
            error += share * float(output_error(rows, inputs, found.dequantize()).sum())
        if error < best_error:
            best, best_error = scale, error
    return best
