"""GPTQ and AWQ folders as inputs: packed here number by number, as the two tools pack, and compared with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hf_holding, hf_logits, hf_model
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: nibble i of a word holds output AWQ_ORDER[i] of its eight
IDS = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(0))
WEIGHT = "model.layers.2.mlp.down_proj"  # (64, 128)


def packed(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(A, B * 32 / bits) -> (A, B) int32: one number after the other into each word, the first in the lowest bits."""
    per_word = 32 // bits
    rows = []
    for row in values.tolist():
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for nibble in range(per_word):
                word |= row[start + (order[nibble] if order else nibble)] << (bits * nibble)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def folder_of(
    original: Path,
    out: Path,
    quantization: dict[str, Any],
    *,
    zero: Callable[[tuple[int, int]], Tensor],
    act_order: bool = False,
) -> dict[str, Tensor]:
    """Write a folder of random integers; the return value is what its matrices are, computed by the formats' definition."""
    bits, method = quantization.get("bits", 4), quantization["quant_method"]
    minus = 1 if quantization.get("checkpoint_format") == "gptq" else 0
    state, meaning, draw = {}, {}, torch.Generator().manual_seed(0)
    for name, value in load_file(original / "model.safetensors").items():
        if "_proj" not in name and name != "lm_head.weight":
            state[name] = meaning[name] = value.to(torch.float16)
            continue
        (rows, columns), weight = value.shape, name.removesuffix(".weight")
        groups = columns // quantization["group_size"] if quantization["group_size"] > 0 else 1
        codes = torch.randint(0, 1 << bits, (columns, rows), generator=draw)
        zeros = zero((groups, rows))
        scales = (torch.rand(groups, rows, generator=draw) / (1 << bits) + 0.01).to(torch.float16)
        order = torch.arange(columns) * groups // columns
        if act_order:
            order = order[torch.randperm(columns, generator=draw)]
        meaning[name] = (scales.float()[order] * (codes - zeros[order])).T.contiguous()
        if method == "awq":
            state[f"{weight}.qweight"] = packed(codes, bits, AWQ_ORDER)
            state[f"{weight}.qzeros"] = packed(zeros, bits, AWQ_ORDER)
        else:
            state[f"{weight}.qweight"] = packed(codes.T, bits).T.contiguous()
            state[f"{weight}.qzeros"] = packed(zeros - minus, bits)
            state[f"{weight}.g_idx"] = order.to(torch.int32)
        state[f"{weight}.scales"] = scales
    out.mkdir()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((original / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))
    return meaning


def middle(bits: int) -> Callable[[tuple[int, int]], Tensor]:
    return lambda shape: torch.full(shape, 1 << (bits - 1))


def anything(bits: int) -> Callable[[tuple[int, int]], Tensor]:
    return lambda shape: torch.randint(1, 1 << bits, shape, generator=torch.Generator().manual_seed(1))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
KEPT: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq int8 per channel": {**GPTQ, "bits": 8, "group_size": -1},
    "awq without zero points": AWQ,
}
ROUNDED: dict[str, tuple[dict[str, Any], bool]] = {
    "gptq with zero points": (GPTQ, False),
    "gptq in the order of activations": (GPTQ, True),
    "awq": (AWQ, False),
    "awq per group of 16": ({**AWQ, "group_size": 16}, False),
}


@pytest.mark.parametrize("shape", ["tiny", "untied", "gemma1", "gemma3_scaled"])
@pytest.mark.parametrize("quantization", KEPT.values(), ids=KEPT.keys())
def test_integers_without_zero_points_stay_as_they_are(
    quantization: dict[str, Any], shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The quantized checkpoint that an export makes of the folder holds the same numbers, and so does transformers' model."""
    bits = quantization["bits"]
    meaning = folder_of(checkpoint(shape), tmp_path / "given", quantization, zero=middle(bits))
    given = open_weights(tmp_path / "given")
    kept = given.configs[WEIGHT]
    assert given.config.tie_word_embeddings == (shape != "untied")
    assert given.is_quantized and kept is not None and kept.bits == bits
    made = write_quantized(given, make_recipe(32), tmp_path / "made")
    assert isinstance(made, QuantizedCheckpoint) and made.scale_dtype(WEIGHT) == torch.float16
    if shape == "untied":
        assert given.configs["lm_head"] == made.configs["lm_head"] == kept
    for name in weight_shapes(given.config):
        assert_close(given.matrix(name), meaning[f"{name}.weight"].float(), rtol=0.0, atol=0.0)
        assert_close(made.matrix(name), meaning[f"{name}.weight"].float(), rtol=0.0, atol=0.0)
    expected = hf_logits(hf_holding(checkpoint(shape), meaning), IDS)
    (tmp_path / "float").mkdir()
    save_file(
        {name: value.float().contiguous() for name, value in given.load().state_dict().items()},
        tmp_path / "float" / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "float" / "config.json").write_text((checkpoint(shape) / "config.json").read_text())
    assert_close(hf_logits(hf_model(tmp_path / "float"), IDS), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("shape", ["tiny", "untied", "gemma1", "gemma3_scaled"])
@pytest.mark.parametrize(("quantization", "act_order"), ROUNDED.values(), ids=ROUNDED.keys())
def test_other_integers_are_float_weights(
    quantization: dict[str, Any],
    act_order: bool,
    shape: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    zero = middle(4) if act_order else anything(4)
    meaning = folder_of(checkpoint(shape), tmp_path / "given", quantization, zero=zero, act_order=act_order)
    given = open_weights(tmp_path / "given")
    assert not given.is_quantized and given.configs[WEIGHT] is None and given.dtype(WEIGHT) == torch.float32
    for name in weight_shapes(given.config):
        assert_close(given.matrix(name), meaning[f"{name}.weight"].float(), rtol=0.0, atol=0.0)
    matrices = {"tiny": 28, "untied": 29, "gemma1": 28, "gemma3_scaled": 21}[shape]
    assert f"the integers of {matrices} matrices" in caplog.text and "rounded again" in caplog.text


def misshapen(state: dict[str, Tensor]) -> None:
    state[f"{WEIGHT}.qweight"] = state[f"{WEIGHT}.qweight"][1:].clone()


def foreign_group(state: dict[str, Tensor]) -> None:
    state[f"{WEIGHT}.g_idx"] = state[f"{WEIGHT}.g_idx"] + 1


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "three bits": ({**GPTQ, "bits": 3}, lambda state: None, "weights of 3 bits; supported: 4"),
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, lambda state: None, "gptq / marlin; supported: gptq / gptq"),
    "gemv": ({**AWQ, "version": "gemv"}, lambda state: None, "awq / gemv"),
    "shape": (GPTQ, misshapen, f"{WEIGHT}.qweight has shape [15, 64], expected [16, 64]"),
    "no scales": (GPTQ, lambda state: state.pop(f"{WEIGHT}.scales"), f"{WEIGHT}.scales is missing"),
    "order": (GPTQ, foreign_group, f"{WEIGHT}.g_idx does not name one of 4 groups"),
    "bias": (GPTQ, lambda state: state.update({f"{WEIGHT}.bias": torch.ones(64)}), f"{WEIGHT}.bias"),
}


@pytest.mark.parametrize(("quantization", "damage", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_one_line(
    quantization: dict[str, Any],
    damage: Callable[[dict[str, Tensor]], object],
    words: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "given"
    folder_of(checkpoint("tiny"), out, {**quantization, "bits": 4}, zero=middle(4))
    state = load_file(out / "model.safetensors")
    damage(state)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))
    with pytest.raises(InputError) as caught:
        open_weights(out)
    assert words in str(caught.value) and "\n" not in str(caught.value)
