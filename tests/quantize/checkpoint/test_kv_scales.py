"""Scales of an int8 KV cache: collected from chunks, stored beside a checkpoint, and refused when damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hf_logits, hf_quantized
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.checkpoint.kv_scales import KV_FILE, KVRanges, KVScales, write_kv_scales
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe

LAYERS, HEADS, DIM = 4, 2, 32  # TINY_CONFIG's
IDS = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(0))  # (T,)
V_SCALE = "model.layers.2.self_attn.v_scale"


def some_scales() -> KVScales:
    rng = torch.Generator().manual_seed(0)
    return {i: tuple(torch.rand(2, HEADS, DIM, generator=rng) + 0.01) for i in range(LAYERS)}


def quantized(folder: Path, out: Path) -> QuantizedCheckpoint:
    """A quantized folder with scales beside it."""
    write_quantized(Checkpoint.open(folder), make_recipe(4), out)
    write_kv_scales(out, some_scales())
    return QuantizedCheckpoint.open(out)


def test_scales_cover_the_largest_magnitude_of_each_channel_over_all_chunks() -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.normal(size=(2, 3, HEADS, tokens, DIM)).astype(np.float32) for tokens in (5, 1, 7)]  # K and V, B 3
    ranges = KVRanges()
    for layer in (1, 0):
        for k, v in chunks:
            ranges.add(layer, torch.tensor((layer + 1) * k), torch.tensor((layer + 1) * v))
    found = ranges.scales(1.25)
    assert list(found) == [0, 1]
    largest = np.max([np.abs(chunk).max(axis=(1, 3)) for chunk in chunks], axis=0)  # (2, K, D)
    for layer, pair in found.items():
        for scale, expected in zip(pair, (layer + 1) * largest * 1.25 / 127, strict=True):
            assert scale.dtype == torch.float32 and scale.shape == (HEADS, DIM)
            np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)


def test_a_channel_that_is_always_zero_has_a_scale_above_zero() -> None:
    ranges = KVRanges()
    ranges.add(0, torch.zeros(1, HEADS, 3, DIM), torch.ones(1, HEADS, 3, DIM))
    k_scale, _ = ranges.scales()[0]
    assert (k_scale > 0).all() and (1.0 / k_scale).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_layer(bad: float) -> None:
    values = torch.zeros(1, HEADS, 3, DIM)
    values[0, 1, 2, 5] = bad
    with pytest.raises(InputError, match="^V of layer 3 is NaN or infinite on the calibration text; the weights"):
        KVRanges().add(3, torch.zeros(1, HEADS, 3, DIM), values)


def test_scales_come_back_from_the_folder_and_go_along_when_it_is_written_again(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    first = quantized(checkpoint(), tmp_path / "first")
    second = write_quantized(first, make_recipe(4), tmp_path / "second")
    for weights in (first, second):
        assert weights.kv_scales is not None and weights.kv_scales.keys() == some_scales().keys()
        for layer, expected in some_scales().items():
            assert_close(weights.kv_scales[layer], expected, rtol=0.0, atol=0.0)
    (tmp_path / "second" / KV_FILE).unlink()
    assert QuantizedCheckpoint.open(tmp_path / "second").kv_scales is None


def test_transformers_loads_the_folder_as_if_the_scales_were_not_there(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    quantized(checkpoint(), tmp_path)
    found = hf_logits(hf_quantized(tmp_path), IDS)
    (tmp_path / KV_FILE).unlink()
    assert_close(found, hf_logits(hf_quantized(tmp_path), IDS), rtol=0.0, atol=0.0)


def _replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a layer is missing": (
        lambda tensors: {name: value for name, value in tensors.items() if name != V_SCALE},
        f"tensor {V_SCALE} is missing",
    ),
    "another shape": (
        _replaced(V_SCALE, lambda scale: scale[:1]),
        rf"{V_SCALE} has shape \[1, 32\], config.json asks for \[2, 32\]",
    ),
    "integers": (_replaced(V_SCALE, lambda scale: scale.int()), f"{V_SCALE} is I32; supported: BF16"),
    "zero": (_replaced(V_SCALE, lambda scale: scale * (scale < 0.9)), f"{V_SCALE} holds scales that are not positive"),
    "negative": (_replaced(V_SCALE, lambda scale: -scale), f"{V_SCALE} holds scales that are not positive"),
    "NaN": (_replaced(V_SCALE, lambda scale: scale * torch.nan), f"{V_SCALE} holds scales that are not positive"),
    "infinite": (_replaced(V_SCALE, lambda scale: scale / 0), f"{V_SCALE} holds scales that are not positive"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_scales_are_refused_by_name(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    quantized(checkpoint(), tmp_path)
    path = tmp_path / KV_FILE
    save_file(damage(load_file(path)), path)
    with pytest.raises(InputError, match=message) as refused:
        QuantizedCheckpoint.open(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_truncated_file_is_refused_by_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    quantized(checkpoint(), tmp_path)
    path = tmp_path / KV_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{KV_FILE} is damaged or truncated"):
        QuantizedCheckpoint.open(tmp_path)
