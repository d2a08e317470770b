"""The rules that every backend relies on, for many random weights: range, scale, error, and what a zero becomes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.quantize.integers import MIN_SCALE, SCALES, SHRINKS, QuantizedTensor, quantize
from gemma_edge.quantize.recipe import QuantConfig

CONFIGS = [QuantConfig(4, 32), QuantConfig(4, 96), QuantConfig(4, 0), QuantConfig(8, 0), QuantConfig(8, 32)]
IDS = [f"int{c.bits}-{c.group_size or 'channel'}" for c in CONFIGS]
ROWS, COLUMNS = 24, 192
LOWEST, HIGHEST = {4: -8, 8: -127}, {4: 7, 8: 127}
BF16_ROUNDING = 2.0**-8  # 8 significant bits: a number moves by at most this part of itself


def weights(seed: int) -> Tensor:
    """Rows as models have them and as they should not: bell-shaped, heavy-tailed, one-sided, of all sizes from 1e-9 to 1e4."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(ROWS, COLUMNS, generator=draw)
    normal[6:12] = normal[6:12] ** 3
    normal[12:16] = normal[12:16].abs()
    normal[16] = 0.0
    normal[17, 1:] = 0.0
    sizes = 10.0 ** torch.linspace(-9, 4, ROWS)[torch.randperm(ROWS, generator=draw)]
    return normal * sizes[:, None]


def groups(values: Tensor, config: QuantConfig) -> Tensor:
    return values.reshape(-1, config.group_size or values.shape[1])  # (N, G)


def each_group(found: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Codes (N, G) and scale (N, 1) as float32."""
    return groups(found.codes.float(), found.config), found.scale.float().reshape(-1, 1)


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_codes_and_scales_have_the_form_that_backends_take(config: QuantConfig, method: str) -> None:
    for seed in range(5):
        found = quantize(weights(seed), config, method)
        assert found.codes.dtype == torch.int8 and found.codes.shape == (ROWS, COLUMNS)
        assert found.codes.min() >= LOWEST[config.bits] and found.codes.max() <= HIGHEST[config.bits]
        assert found.scale.dtype == torch.bfloat16
        assert found.scale.shape == (ROWS, COLUMNS // (config.group_size or COLUMNS))
        assert found.scale.isfinite().all() and (found.scale >= MIN_SCALE).all()
        assert (found.scale.to(torch.float16) > 0).all()  # also where a backend stores scales as float16
        assert found.config == config


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_codes_are_rounded_with_the_scale_that_is_stored(config: QuantConfig, method: str) -> None:
    """The scale is rounded to bfloat16 first: codes made with the unrounded one are off by one here and there, silently."""
    for seed in range(5):
        values = weights(seed)
        found = quantize(values, config, method)
        codes, scale = each_group(found)
        expected = (groups(values, config) / scale).round().clamp(LOWEST[config.bits], HIGHEST[config.bits])
        assert_close(codes, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_round_trip_error_of_rtn_is_at_most_half_a_step(config: QuantConfig) -> None:
    """Also for the largest weight of a group: absmax / scale <= 127 * (1 + 2^-8) = 127.496, which still rounds to 127."""
    for seed in range(5):
        values = weights(seed)
        found = quantize(values, config, "rtn")
        _, scale = each_group(found)
        error = (groups(values, config) - groups(found.dequantize(), config)).abs()
        assert (error <= 0.5 * scale * (1 + 1e-6)).all()  # 1e-6: float32 rounding of the quotient and of the product
        assert (error > 0.4 * scale).any()  # and the bound is not idle


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_rtn_uses_the_whole_range(config: QuantConfig) -> None:
    values = weights(0)
    codes, scale = each_group(quantize(values, config, "rtn"))
    full = scale.flatten() > 2 * MIN_SCALE  # not the groups whose scale is the smallest allowed one
    assert full.any()
    assert (codes[full].abs().amax(dim=1) == HIGHEST[config.bits]).all()


def squared_error(values: Tensor, found: QuantizedTensor) -> Tensor:
    difference = groups(values.double(), found.config) - groups(found.dequantize().double(), found.config)
    return difference.square().sum(dim=1)  # (N,)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_mse_is_never_worse_than_rtn_but_for_the_rounding_of_its_scale(config: QuantConfig) -> None:
    """In each group: |w - s q| moves by at most |ds| |q| when the scale moves by ds, and by bfloat16 both scales move.

    Among unrounded scales mse takes the best of several, rtn's own among them, refitted; then both round theirs. So
    E_mse <= E_rtn + 2^-8 |s q|_mse + 2^-8 |s q|_rtn, where E is the root of the squared error.
    """
    for seed in range(5):
        values = weights(seed)
        both = [quantize(values, config, method) for method in ("mse", "rtn")]
        mse, rtn = (squared_error(values, found).sqrt() for found in both)
        lengths = sum(groups(found.dequantize(), config).double().norm(dim=1) for found in both)
        smallest = MIN_SCALE * groups(values, config).shape[1] ** 0.5  # groups at the smallest scale: half a step each
        assert (
            mse <= rtn + BF16_ROUNDING * 1.02 * lengths + smallest
        ).all()  # 1.02: the rounded lengths stand for the exact


def test_mse_takes_the_best_of_its_scales() -> None:
    config = QuantConfig(4, 32)
    values = weights(1)
    found = quantize(values, config, "mse")
    w = groups(values, config).double()
    widest = w.abs().amax(dim=1, keepdim=True) / 7
    best = torch.full((len(w),), torch.inf, dtype=torch.float64)
    for shrink in SHRINKS:
        codes = (w / (widest * shrink).clamp_min(MIN_SCALE)).round().clamp(-8, 7)
        fitted = (w * codes).sum(1) / codes.square().sum(1).clamp_min(1)
        best = torch.minimum(best, (w - fitted[:, None] * codes).norm(dim=1))
    length = groups(found.dequantize(), config).double().norm(dim=1)
    smallest = MIN_SCALE * 32**0.5
    assert (squared_error(values, found).sqrt() <= best + BF16_ROUNDING * 1.02 * length + smallest).all()


@pytest.mark.parametrize(("config", "gain"), [(QuantConfig(4, 32), 0.15), (QuantConfig(4, 96), 0.20)], ids=["32", "96"])
def test_mse_is_clearly_better_on_bell_shaped_weights_in_groups(config: QuantConfig, gain: float) -> None:
    """What the search is for."""
    values = torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0))
    mse, rtn = (squared_error(values, quantize(values, config, method)).sum() for method in ("mse", "rtn"))
    assert mse < (1 - gain) * rtn


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12])
def test_a_group_of_nothing_has_a_scale_and_becomes_zero(size: float, bits: int, method: str) -> None:
    """A scale of zero is a division by zero in one backend and NaN in another."""
    values = torch.ones(2, 64)
    values[:, :32] = size
    found = quantize(values, QuantConfig(bits, 32), method)
    assert (found.codes[:, :32] == 0).all()
    assert (found.scale[:, 0] == MIN_SCALE).all()
    assert (found.dequantize()[:, :32] == 0).all()
    # 1 = 7 * s or 127 * s, and s has 8 significant bits
    assert_close(found.dequantize()[:, 32:], values[:, 32:], rtol=BF16_ROUNDING, atol=0.0)


@pytest.mark.parametrize("method", SCALES)
def test_a_tiny_group_keeps_what_half_of_the_smallest_scale_can_tell(method: str) -> None:
    values = torch.tensor([[3e-7, -1e-7] * 16])  # rtn's scale would be 4e-8, below the smallest of float16
    found = quantize(values, QuantConfig(4, 32), method)
    assert (found.dequantize() - values).abs().max() <= MIN_SCALE / 2


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_what_fits_the_grid_comes_back_unchanged(config: QuantConfig, method: str) -> None:
    draw = torch.Generator().manual_seed(2)
    high = HIGHEST[config.bits]
    codes = torch.randint(-high, high + 1, (ROWS, COLUMNS), generator=draw)
    grouped = groups(codes, config)
    grouped[:, 0] = high  # so that absmax finds the scale
    scale = 2.0 ** torch.randint(-12, 3, (len(grouped), 1), generator=draw)
    values = (grouped * scale).view(ROWS, COLUMNS)
    found = quantize(values, config, method)
    assert_close(found.codes, grouped.view(ROWS, COLUMNS).to(torch.int8), rtol=0.0, atol=0.0)
    assert_close(found.dequantize(), values, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_rows_do_not_know_of_each_other(config: QuantConfig, method: str) -> None:
    """So that a weight can be quantized slice by slice."""
    values = weights(3)
    whole = quantize(values, config, method)
    for start, stop in [(0, 1), (1, 10), (10, ROWS)]:
        part = quantize(values[start:stop], config, method)
        assert_close(part.codes, whole.codes[start:stop], rtol=0.0, atol=0.0)
        assert_close(part.scale, whole.scale[start:stop], rtol=0.0, atol=0.0)


def test_groups_run_along_the_rows() -> None:
    values = torch.ones(2, 64)
    values[1, 32:] = 7.0
    found = quantize(values, QuantConfig(4, 32), "rtn")
    assert_close(found.scale.float(), torch.tensor([[1.0, 1.0], [1.0, 7.0]]) / 7, rtol=BF16_ROUNDING, atol=0.0)


def test_rows_that_the_group_does_not_divide_are_no_input() -> None:
    with pytest.raises(RuntimeError):
        quantize(torch.ones(4, 48), QuantConfig(4, 32), "rtn")
