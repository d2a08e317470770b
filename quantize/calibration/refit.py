"""Post-norm weights refitted after rounding: least squares per channel, towards the output of the original block.

From Gemma 2 on, post-norms multiply each channel of a branch just before it joins the residual stream, so the best factor of
every channel has a closed form. The new weights are kept only if they bring the block's output closer to the original's on
windows that they were not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gemma_edge.model.gemma import DecoderLayer
from gemma_edge.quantize.calibration.windows import Run

PULL = 0.01  # pull towards the old weights, as a part of the evidence
MAX_WINDOWS = 16  # windows that are used; a few numbers per channel need no more
HELD_OUT = 4  # one window in four is held out, to judge the result


@torch.no_grad()
def refit_post_norms(
    block: DecoderLayer, original: DecoderLayer, x: Tensor, run: Run, eps: float
) -> tuple[float, float]:
    """Refit a quantized block's post-norms in place, where it has some; they stay as they are if that does not help.

    Args:
        block: the quantized one.
        original: the same in float.
        x: (N, T, hidden) windows entering the block, the same for both.
        eps: epsilon of the norms.

    Returns:
        squared error of the block's output on the windows held out, before and after.
    """
    x = x[:MAX_WINDOWS]
    count = max(1, len(x) // HELD_OUT)
    branches = _branches(block)
    targets = [_streams(original, window, run, [after for _, after in branches]) for window in x]
    before = _error(block, x[-count:], targets[-count:], run)
    if count == len(x) or not branches:
        return before, before
    kept = {norm: block.get_parameter(f"{norm}.weight").data.clone() for norm, _ in branches}
    for branch in branches:
        _refit(block, x[:-count], [target[branch[1]] for target in targets[:-count]], run, branch, eps)
    after = _error(block, x[-count:], targets[-count:], run)
    if after >= before:
        for norm, weight in kept.items():
            block.get_parameter(f"{norm}.weight").data.copy_(weight)
    return before, min(before, after)


def _branches(block: DecoderLayer) -> list[tuple[str, str | None]]:
    """Each post-norm, and the module whose input is the residual stream just after it; None: the block's output."""
    norms = block.norms
    pairs = ((norms.after_attention, norms.before_mlp), (norms.after_mlp, None))
    return [(norm, after) for norm, after in pairs if norm is not None]


def _refit(
    block: nn.Module, x: Tensor, targets: Sequence[Tensor], run: Run, branch: tuple[str, str | None], eps: float
) -> None:
    """Set factor = <n, t> / <n, n> per channel, where n is the normalised branch and t what should be added to the stream."""
    norm, after = branch
    weight = block.get_parameter(f"{norm}.weight").data  # (hidden,)
    along, evidence = torch.zeros_like(weight), torch.zeros_like(weight)
    for window, target in zip(x, targets, strict=True):
        seen = _streams(block, window, run, branch)
        output, normed = seen[after], seen[norm]
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)  # (1, T, hidden)
        missing = target - (output - normed * (1.0 + weight))  # what the branch should have added
        along += (normed * missing).sum((0, 1))
        evidence += normed.square().sum((0, 1))
    pull = PULL * evidence + 1e-12
    weight.copy_((along + pull * (1.0 + weight)) / (evidence + pull) - 1.0)


def _error(block: nn.Module, x: Tensor, targets: Sequence[dict[str | None, Tensor]], run: Run) -> float:
    pairs = zip(x, targets, strict=True)
    return sum(float((run(block, window[None]) - target[None]).square().sum()) for window, target in pairs)


def _streams(block: nn.Module, window: Tensor, run: Run, names: Sequence[str | None]) -> dict[str | None, Tensor]:
    """The input of each named module on a window (T, hidden), and under None the block's output: (1, T, hidden) each."""
    seen: dict[str | None, Tensor] = {}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.__setitem__(name, args[0])
        )
        for name in names
        if name
    ]
    try:
        seen[None] = run(block, window[None])
    finally:
        for hook in hooks:
            hook.remove()
    return seen
