"""Calibration of one block: its integers are fitted to the activations of real text.

One block's float weights and its second moments are in memory at a time, whatever the model's size. How a matrix is rounded is
gptq.py's, and which scales are folded is awq.py's. No architecture is built in: a `Topology` says which linears read the same
input and where scales can fold, so that benchmarks can calibrate other models too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gemma_edge.errors import InputError
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.calibration.awq import Fold, apply_fold, expand, find_scale
from gemma_edge.quantize.calibration.gptq import Inputs, hscale, quantize_outputs
from gemma_edge.quantize.calibration.windows import Each, Run, in_turn, shards
from gemma_edge.quantize.integers import QuantizedTensor, quantize, round_to
from gemma_edge.quantize.recipe import DATA_FREE, QuantConfig


@dataclass(frozen=True)
class Topology:
    """What calibration needs to know about a block."""

    sites: tuple[tuple[str, ...], ...]  # groups of linears that read the same input
    folds: tuple[Fold, ...]  # where scales can be folded, in the order in which they are


@dataclass(frozen=True)
class Choice:
    """The integers of one linear, and how they are found."""

    config: QuantConfig | None  # None leaves it float
    method: str


def decoder_topology(
    attention_norm: str, mlp_norm: str, *, plus_one: bool, heads_per_kv: int, head_dim: int
) -> Topology:
    """A decoder block with Hugging Face's names for its linears; the names of its two pre-norms are given."""
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    return Topology(
        sites=(attention, ("self_attn.o_proj",), mlp, ("mlp.down_proj",)),
        # folds of linears come first: else rows of v and up that are far larger than the others would decide the norms' scales
        folds=(
            Fold("self_attn.v_proj", ("self_attn.o_proj",), repeat=heads_per_kv, head_dim=head_dim),
            Fold("mlp.up_proj", ("mlp.down_proj",)),
            Fold(attention_norm, attention, plus_one=plus_one),
            Fold(mlp_norm, mlp, plus_one=plus_one),
        ),
    )


def gemma_topology(config: GemmaConfig) -> Topology:
    """Gemma's block: names are those of model/gemma.py."""
    return decoder_topology(
        config.norms.before_attention,
        config.norms.before_mlp,
        plus_one=True,
        heads_per_kv=config.num_attention_heads // config.num_key_value_heads,
        head_dim=config.head_dim,
    )


@torch.no_grad()
def second_moments(
    block: nn.Module, x: Tensor, run: Run, topology: Topology, each: Each = in_turn
) -> dict[str, Tensor]:
    """X^T X / n of the inputs of every site: (in, in) float32, by the name of the site's first linear.

    Args:
        x: (N, T, hidden), N windows.
        each: computes shards of them.

    Raises:
        InputError: the activations are NaN or infinite.
    """
    moments: dict[str, Tensor] = {}
    part = partial(_moments, block, run, topology, 1.0 / (x.shape[0] * x.shape[1]))
    for found in each(part, shards(x)):
        for name, moment in found.items():
            if name in moments:
                moments[name] += moment
            else:
                moments[name] = moment
    for name, moment in moments.items():
        if not moment.diagonal().isfinite().all():
            raise InputError(f"the activations that {name} reads are NaN or infinite on the calibration text")
    return moments


@torch.no_grad()
def _moments(block: nn.Module, run: Run, topology: Topology, weight: float, x: Tensor) -> dict[str, Tensor]:
    """The part of the second moments that a shard (n, T, hidden) adds; `weight` is that of each token."""
    moments: dict[str, Tensor] = {}

    def observe(name: str, seen: Tensor) -> None:
        rows = seen.flatten(0, -2)  # (tokens, in)
        if name not in moments:
            moments[name] = torch.zeros(rows.shape[1], rows.shape[1])
        moments[name].addmm_(rows.T, rows, alpha=weight)

    hooks = [
        block.get_submodule(site[0]).register_forward_pre_hook(
            lambda _module, args, name=site[0]: observe(name, args[0])
        )
        for site in topology.sites
    ]
    try:
        for window in x:
            run(block, window[None])
    finally:
        for hook in hooks:
            hook.remove()
    return moments


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    moments: dict[str, Tensor],
    topology: Topology,
    choices: Mapping[str, Choice],
    *,
    rounds: int = 0,
    each: Each = in_turn,
) -> dict[str, QuantizedTensor]:
    """Find the integers of a block and put their values in place of its weights.

    Args:
        block: float weights; afterwards it computes what the integers compute, with the folds applied to its norms.
        moments: from `second_moments`; each is removed after its use, to free its memory.
        choices: the integers of each linear, by its name.
        rounds: as in `quantize_outputs`.
        each: tries the scales of a fold, factors the second moments, and rounds the linears.

    Returns:
        the linears that are quantized, by name.
    """
    for fold in topology.folds:
        _fold(block, fold, moments, topology, choices, each)
    by_site = [[name for name in site if choices[name].config is not None] for site in topology.sites]
    read = [any(choices[name].method not in DATA_FREE for name in names) for names in by_site]
    seen = [moments.pop(site[0]) for site, needed in zip(topology.sites, read, strict=True) if needed]
    moments.clear()
    factored = iter(each(Inputs.from_hessian, _emptied(seen)))

    def linears() -> Iterator[tuple[Tensor, Inputs | None, Choice]]:
        for names, needed in zip(by_site, read, strict=True):
            inputs = next(factored) if needed else None
            for name in names:
                yield block.get_parameter(f"{name}.weight").data, inputs, choices[name]
            inputs = None  # its memory is free before the next ones are factored

    names = [name for some in by_site for name in some]
    quantized = dict(zip(names, each(partial(_rounded, rounds), linears()), strict=True))
    for name, integers in quantized.items():
        block.get_parameter(f"{name}.weight").data.copy_(integers.dequantize())
    return quantized


def _emptied(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The tensors of a list, which lets go of each."""
    while tensors:
        yield tensors.pop(0)


@torch.no_grad()
def _rounded(rounds: int, linear: tuple[Tensor, Inputs | None, Choice]) -> QuantizedTensor:
    """The integers of a weight whose site was factored, where its method looks at that."""
    weight, inputs, choice = linear
    assert choice.config is not None, "others stay float"
    if choice.method in DATA_FREE:
        return quantize(weight, choice.config, choice.method)
    assert inputs is not None, "its method needs them"
    return WITH_INPUTS[choice.method](weight, inputs, choice.config, rounds)


def _fold(
    block: nn.Module,
    fold: Fold,
    moments: dict[str, Tensor],
    topology: Topology,
    choices: Mapping[str, Choice],
    each: Each,
) -> None:
    """Find and apply one scale if the methods of all its consumers use one, and scale their second moment with it."""
    configs = [choices[name].config for name in fold.consumers if choices[name].method.startswith("awq")]
    folded = [config for config in configs if config is not None]
    if len(folded) < len(fold.consumers):
        return
    (site,) = [site[0] for site in topology.sites if site[0] in fold.consumers]
    scale = find_scale(block, fold, moments[site], folded, each)
    apply_fold(block, fold, scale)
    columns = expand(scale, fold)
    moments[site] /= columns * columns[:, None]
    # no other second moment changes: a producer's outputs go to these consumers alone


def _hscale(weight: Tensor, inputs: Inputs, config: QuantConfig, rounds: int) -> QuantizedTensor:
    return round_to(weight, hscale(weight, inputs, config), config)


def _gptq(weight: Tensor, inputs: Inputs, config: QuantConfig, rounds: int) -> QuantizedTensor:
    return quantize_outputs(weight, inputs, config, rounds=rounds)


WITH_INPUTS = {"hscale": _hscale, "awq": _hscale, "gptq": _gptq, "awq+gptq": _gptq}
