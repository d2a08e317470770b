"""Channel scales: folding them changes nothing, and the one that is chosen makes rounding better or is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import DEMO, SHAPES, HFModel, hf_holding, hf_logits, hf_model, kl_divergence, relative_error
from torch import Tensor, nn
from torch.testing import assert_close

from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.model.gemma import Gemma
from gemma_edge.quantize.calibration.awq import Fold, apply_fold, candidates, expand, find_scale
from gemma_edge.quantize.calibration.block import gemma_topology
from gemma_edge.quantize.calibration.gptq import Inputs, output_error, quantize_outputs
from gemma_edge.quantize.recipe import QuantConfig

INT4 = QuantConfig(4, 32)
EXACT = 1e-6  # part of the logits' range: float32 with other factors. Measured: 5e-7 for Gemma 2, 1.5e-7 for Gemma 3.
EXACT_GEMMA1 = 5e-6  # measured: 2.5e-6; transformers itself is 6e-6 away from its own float64
FOLD = Fold("norm", ("first", "second"))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fold_everything(model: Gemma, seed: int) -> int:
    """Random scales between a tenth and ten times, wherever one can go; how many tensors were changed."""
    topology = gemma_topology(model.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for i, layer in enumerate(model.model.layers):
        for j, fold in enumerate(topology.folds):
            producer = layer.get_parameter(f"{fold.producer}.weight")
            apply_fold(layer, fold, draw(seed + 10 * i + j, len(producer)).clamp(-2.3, 2.3).exp())
    return sum(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def held_by_transformers(folder: Path, model: Gemma) -> HFModel:
    return hf_holding(folder, {name: value for name, value in model.state_dict().items() if "inv_freq" not in name})


def test_folds_change_nothing_on_the_demo_model() -> None:
    ids = torch.randint(7, 4096, (200,), generator=torch.Generator().manual_seed(0))  # longer than the local window
    model = Checkpoint.open(DEMO).load()
    layers = model.config.num_hidden_layers
    assert fold_everything(model, seed=0) == layers * 9  # 7 linears and the two pre-norms
    assert kl_divergence(hf_logits(held_by_transformers(DEMO, model), ids), hf_logits(hf_model(DEMO), ids)) <= 1e-7


@pytest.mark.parametrize("shape", SHAPES)
def test_folds_change_nothing_whatever_the_heads(shape: str, checkpoint: Callable[..., Path]) -> None:
    """Two or three query heads share a value head here: its scale must reach all of their columns of o_proj."""
    ids = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(0))
    model = Checkpoint.open(checkpoint(shape)).load()
    fold_everything(model, seed=1)
    before = hf_logits(hf_model(checkpoint(shape)), ids)
    after = hf_logits(held_by_transformers(checkpoint(shape), model), ids)
    assert kl_divergence(after, before) <= 1e-7
    bound = EXACT_GEMMA1 if model.config.architecture == "gemma" else EXACT
    assert relative_error(after, before) <= bound  # without a softcap, logits are so large that KL sees only one token


def error_after(shape: str, checkpoint: Callable[..., Path], change: Callable[[nn.Module, Tensor], None]) -> float:
    """Relative error after a change of every layer, which is given a scale of each channel of a key head (D,)."""
    ids, folder = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(0)), checkpoint(shape)
    model = Checkpoint.open(folder).load()
    for i in range(model.config.num_hidden_layers):
        half = draw(i, model.config.head_dim // 2).clamp(-1.0, 1.0).exp()
        both = torch.cat([half, half])  # the same for the two coordinates of a rotary plane
        change(model.get_submodule(f"model.layers.{i}.self_attn"), both)
    return relative_error(hf_logits(held_by_transformers(folder, model), ids), hf_logits(hf_model(folder), ids))


def move_between_projections(attention: nn.Module, scale: Tensor) -> None:
    for name, factor in (("q_proj", scale), ("k_proj", 1.0 / scale)):
        weight = attention.get_parameter(f"{name}.weight").data
        weight.view(-1, len(scale), weight.shape[1]).mul_(factor[:, None])


def move_between_norms(attention: nn.Module, scale: Tensor) -> None:
    for name, factor in (("q_norm", scale), ("k_norm", 1.0 / scale)):
        attention.get_parameter(f"{name}.weight").data.add_(1.0).mul_(factor).sub_(1.0)


def test_norms_of_queries_and_keys_stop_a_scale_of_the_projections_and_pass_one_of_their_own(
    checkpoint: Callable[..., Path],
) -> None:
    """So a topology has no fold from q_proj to k_proj: without these norms it would be exact, with them it is wrong."""
    assert error_after("tiny", checkpoint, move_between_projections) <= EXACT
    for shape in ("gemma3", "gemma3_scaled", "gemma3_odd"):
        folds = gemma_topology(Checkpoint.open(checkpoint(shape)).config).folds
        assert not {"self_attn.q_proj", "self_attn.k_proj"} & {fold.producer for fold in folds}
        assert error_after(shape, checkpoint, move_between_projections) > 1e-2
        assert error_after(shape, checkpoint, move_between_norms) <= EXACT


def test_a_value_heads_scale_is_repeated_for_its_query_heads() -> None:
    fold = Fold("v", ("o",), repeat=2, head_dim=3)
    found = expand(torch.arange(6.0), fold)
    assert found.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


class Reader(nn.Module):
    """A plain producer of 64 channels and two matrices that read them."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(first.shape[1]), requires_grad=False)
        for name, weight in (("first", first), ("second", second)):
            linear = nn.Linear(weight.shape[1], len(weight), bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)


def moment(seed: int, columns: int = 64, tokens: int = 1024) -> Tensor:
    x = draw(seed, tokens, columns) @ (torch.eye(columns) + 0.2 * draw(seed + 1, columns, columns))
    return x.T @ x / tokens


def error_under(block: nn.Module, hessian: Tensor, scale: Tensor) -> float:
    inputs = Inputs.from_hessian(hessian / scale / scale[:, None])
    total = 0.0
    for name in FOLD.consumers:
        weight = block.get_parameter(f"{name}.weight") * scale
        total += float(output_error(weight, inputs, quantize_outputs(weight, inputs, INT4).dequantize()).sum())
    return total


def test_no_scale_where_none_helps() -> None:
    """These weights are integers times a scale already: rounding costs nothing."""
    codes = torch.randint(-7, 8, (2, 16, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, :, ::32] = 7.0
    block = Reader(0.25 * codes[0], 0.5 * codes[1])
    assert_close(find_scale(block, FOLD, moment(1), [INT4, INT4]), torch.ones(64), rtol=0.0, atol=0.0)


def test_the_chosen_scale_is_the_best_candidate_and_no_worse_than_none() -> None:
    block, hessian = Reader(draw(0, 32, 64), draw(1, 48, 64)), moment(2)
    hessian = hessian * (draw(3, 64).exp()[:, None] * draw(3, 64).exp())
    found = find_scale(block, FOLD, hessian, [INT4, INT4])
    errors = [error_under(block, hessian, scale) for scale in candidates(block, FOLD, hessian)]
    assert error_under(block, hessian, found) == min(errors) < errors[0]  # the first is no scale


def test_scales_that_somebody_put_in_between_are_undone() -> None:
    """Whatever they are, the error becomes that of the matrices before."""
    first, second, hessian = draw(0, 32, 64), draw(1, 48, 64), moment(2)
    given = (0.8 * draw(4, 64)).exp()
    plain, scaled = Reader(first.clone(), second.clone()), Reader(first / given, second / given)
    outliers = hessian * given * given[:, None]
    assert error_under(scaled, outliers, torch.ones(64)) > 2 * error_under(plain, hessian, torch.ones(64))
    found = find_scale(scaled, FOLD, outliers, [INT4, INT4])
    expected = find_scale(plain, FOLD, hessian, [INT4, INT4])
    assert error_under(scaled, outliers, found) < 1.1 * error_under(plain, hessian, expected)


@pytest.mark.parametrize("silent", ["inputs", "weights", "both", "everything"])
def test_channels_that_were_silent_are_not_crushed(silent: str) -> None:
    """Their scale was a millionth of the others', and all of their weights were rounded to zero."""
    first, second, hessian = draw(0, 32, 64), draw(1, 48, 64), moment(2)
    if silent in ("inputs", "both"):
        hessian[:, :5] = hessian[:5] = 0.0
    if silent in ("weights", "both"):
        first[:, :5] = second[:, :5] = 0.0
    if silent == "everything":
        hessian[:] = 0.0
    block = Reader(first, second)
    for scale in candidates(block, FOLD, hessian):
        assert scale.isfinite().all() and (scale > 1e-3).all() and (scale < 1e3).all()
        inputs = Inputs.from_hessian(hessian / scale / scale[:, None])
        found = quantize_outputs(first * scale, inputs, INT4).dequantize() / scale
        assert silent == "weights" or (found - first)[:, :5].norm() <= 0.3 * first[:, :5].norm()
