"""Codes and scales of a matrix that keep its *outputs*, given the second moment H = X^T X / n of the inputs it will see.

GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, each one's error spread over the columns that
are still free. It is computed as what it is, Babai's nearest plane algorithm on the Cholesky factor of H itself (Chen et al.,
arXiv 2507.18553): the same codes, without inverting H. Columns go by falling diagonal of H (act-order) while the groups stay
where they are, with scales fixed before (static groups), so that no backend sees an order. What H is measured on is
calibrate.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.quantize.integers import QuantizedTensor, round_scale, searched_scale, to_codes
from gemma_edge.quantize.recipe import QuantConfig

DAMP = 0.01  # of the mean diagonal, added to the diagonal: the paper's
ATTEMPTS = 8  # to factor: the last adds 10^5 times the mean diagonal, and n columns need less than n times
ACTIVE = 1e-5  # of the mean diagonal: what a column has that was ever active
FLOOR = 0.1  # of the median active column: every column counts that much, else it were clipped for the others, and may speak yet
INNER, OUTER = 32, 512  # columns whose errors are spread at once: within the caches, then over the rest of the matrix
SLICE_ELEMENTS = 1 << 20  # of a matrix looked at together


@dataclass(frozen=True)
class Inputs:
    """What linears that read the same activations need to know of them."""

    hessian: Tensor  # (in, in) float32
    weights: Tensor  # (in,) how much each column counts: the diagonal in units of its mean
    order: Tensor  # (in,) int64, columns by rising diagonal
    factor: Tensor  # (in, in) R of the damped H[order][:, order] = R^T R, each row divided by its diagonal element

    @classmethod
    def from_hessian(cls, hessian: Tensor, damp: float = DAMP) -> Inputs:
        """Damp and factor H.

        A singular H (columns never active, fewer tokens than columns) is what damping is for; where it does not suffice in
        float32, it grows tenfold. Columns that were hardly active may be so later: each counts at least FLOOR.

        Raises:
            InputError: H holds NaN or infinite values, or is no second moment.
        """
        diagonal = hessian.diagonal()
        mean = float(diagonal.mean())
        weights = torch.ones_like(diagonal)
        if mean > 0:
            weights = diagonal / mean
            weights = weights.clamp_min(FLOOR * float(weights[weights > ACTIVE].median()))
        order = diagonal.argsort()
        damped = hessian[order][:, order]
        for _ in range(ATTEMPTS):
            damped.diagonal().add_(damp * (mean or 1.0))
            factor, info = torch.linalg.cholesky_ex(damped, upper=True)
            if not info and factor.isfinite().all():
                factor /= factor.diagonal()[:, None].clone()
                return cls(hessian, weights, order, factor)
            damp *= 10
        raise InputError(
            "the second moments of the activations are NaN, infinite or contradict each other; the weights or the"
            " calibration text are damaged: check the model folder, or pass other --calibration text"
        )


def hscale(weight: Tensor, inputs: Inputs, config: QuantConfig) -> Tensor:
    """Scales that round a matrix (out, in) with the least error weighted by the diagonal of H: (out, groups) float32."""
    rows, columns = weight.shape
    group = config.group_size or columns
    weights = inputs.weights.view(-1, group)  # (groups, G)
    scale = torch.empty(rows, columns // group)
    step = max(1, SLICE_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].view(-1, columns // group, group)  # (rows, groups, G)
        scale[start : start + step] = searched_scale(part, config.bits, weights)[..., 0]
    return scale


def gptq(weight: Tensor, inputs: Inputs, scale: Tensor, config: QuantConfig) -> Tensor:
    """Codes for fixed scales.

    Args:
        weight: (out, in) float32.
        scale: (out, groups) float32, bfloat16 values.

    Returns:
        (out, in) int8.
    """
    order, factor = inputs.order, inputs.factor
    group_of = (order // (config.group_size or len(order))).tolist()
    by_group = scale.T.contiguous()  # (groups, out)
    original = weight.T[order]  # (in, out): a column of the matrix is contiguous
    target = original.clone()  # where each column should go, the errors of the columns after it made good
    codes = torch.empty(original.shape, dtype=torch.int8)
    errors = torch.empty(OUTER, original.shape[1])
    for stop in range(len(order), 0, -OUTER):
        start = max(0, stop - OUTER)
        for right in range(stop, start, -INNER):
            left = max(start, right - INNER)
            for j in range(right - 1, left - 1, -1):
                step = by_group[group_of[j]]
                code = to_codes(target[j], step, config.bits)
                codes[j] = code
                error = torch.addcmul(original[j], code, step, value=-1.0, out=errors[j - start])
                target[left:j].addr_(factor[left:j, j], error)
            target[start:left].addmm_(factor[start:left, left:right], errors[left - start : right - start])
        target[:start].addmm_(factor[:start, start:stop], errors[: stop - start])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return codes[back].T.contiguous()


def refit(weight: Tensor, inputs: Inputs, codes: Tensor, scale: Tensor, config: QuantConfig) -> Tensor:
    """The scales that are best for fixed codes: least squares of the outputs, one small system per row.

    With Q the row's codes spread over its groups, minimises (w - Q s)^T H (w - Q s).

    Args:
        weight: (out, in) float32.
        codes: (out, in) int8.
        scale: (out, groups) float32.

    Returns:
        (out, groups) float32, bfloat16 values, all positive: where the best is far from the old one, the old one stays.
    """
    rows, columns = weight.shape
    group, hessian = config.group_size or columns, inputs.hessian
    groups = columns // group
    best = torch.empty_like(scale)
    step = max(1, 8 * SLICE_ELEMENTS // max(columns, groups * groups))
    for start in range(0, rows, step):
        w, q = weight[start : start + step], codes[start : start + step].float()
        old = scale[start : start + step]
        right = (q * (w @ hessian)).view(-1, groups, group).sum(-1)  # (rows, groups)
        left = torch.empty(len(w), groups, groups)
        for g in range(groups):
            inside = slice(g * group, (g + 1) * group)
            left[:, g] = (q * (q[:, inside] @ hessian[inside])).view(-1, groups, group).sum(-1)
        # drawn a little towards what is there, so that codes of a group that are all zero do not make it singular
        pull = 1e-3 * left.diagonal(dim1=1, dim2=2) + 1e-12  # (rows, groups)
        left.diagonal(dim1=1, dim2=2).add_(pull)
        found = torch.linalg.solve_ex(left, (right + pull * old).unsqueeze(-1))[0].squeeze(-1)
        usable = found.isfinite() & (found > 0.5 * old) & (found < 2.0 * old)
        best[start : start + step] = round_scale(torch.where(usable, found, old))
    return best


def output_error(weight: Tensor, inputs: Inputs, found: Tensor) -> Tensor:
    """Mean squared error of each output, (out,), when `found` (out, in) stands for a weight (out, in)."""
    difference = weight - found
    error: Tensor = torch.linalg.vecdot(difference @ inputs.hessian, difference)
    return error


def quantize_outputs(weight: Tensor, inputs: Inputs, config: QuantConfig, *, rounds: int = 0) -> QuantizedTensor:
    """GPTQ under searched scales, then `rounds` times scales refitted and codes found again; each row keeps its best.

    Args:
        weight: (out, in) float32, finite.
        config: bits and group.
    """
    scale = hscale(weight, inputs, config)
    codes = gptq(weight, inputs, scale, config)
    best = QuantizedTensor(codes, scale.to(torch.bfloat16), config)
    if rounds:
        error = output_error(weight, inputs, best.dequantize())
    for _ in range(rounds):
        scale = refit(weight, inputs, codes, scale, config)
        for found in (codes, gptq(weight, inputs, scale, config)):
            tried = QuantizedTensor(found, scale.to(torch.bfloat16), config)
            tried_error = output_error(weight, inputs, tried.dequantize())
            better = tried_error < error
            best.codes[better], best.scale[better] = tried.codes[better], tried.scale[better]
            error = torch.where(better, tried_error, error)
            codes = found
    return best
