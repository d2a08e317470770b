"""What a rounding is predicted to cost, against what it costs transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO, hf_logits, hf_model
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import TABLE, Checkpoint, weight_shapes
from gemma_edge.quantize.calibration import text as calibration
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.mixed import sensitivity
from gemma_edge.quantize.mixed.sensitivity import Errors, measure
from gemma_edge.quantize.options import CalibrationText
from gemma_edge.quantize.recipe import INT8_ROW, QuantConfig, default_method


def gptq(config: QuantConfig) -> str:
    return default_method(config, "balanced")


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Of the demo's text; the last one of four is judged on."""
    found = calibration.windows(DEMO, 2, 512, CalibrationText(tokens=2048))
    return found[:, :128].contiguous()


@pytest.fixture(scope="module")
def measured(windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    folder = tmp_path_factory.mktemp("inputs")
    errors = measure(Checkpoint.open(DEMO), windows, gptq, folder)
    assert list(folder.iterdir()) == []
    return errors


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def test_predictions_are_what_transformers_finds(windows: Tensor, measured: Errors) -> None:
    """Every weight rounded to 8 bits by itself, which needs no calibration: KL on the window that was judged on."""
    model = hf_model(DEMO)
    ids = windows[-1]
    right = hf_logits(model, ids).double().log_softmax(-1)
    predicted, found = [], []
    for weight in weight_shapes(Checkpoint.open(DEMO).config):
        parameter = model.get_parameter(f"{weight}.weight")
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(quantize(original, INT8_ROW, "rtn").dequantize())
        said = hf_logits(model, ids).double().log_softmax(-1)
        with torch.no_grad():
            parameter.copy_(original)
        found.append(float((right.exp() * (right - said)).sum(-1).mean()))
        predicted.append(measured[weight][INT8_ROW])
    expected, guessed = torch.tensor(found), torch.tensor(predicted)
    correlation = torch.corrcoef(torch.stack([ranks(expected), ranks(guessed)]))[0, 1]
    assert correlation > 0.9, correlation
    ratio = guessed / expected
    assert 1 / 3 < ratio.min() and ratio.max() < 3, ratio
    assert float(guessed.sum()) == pytest.approx(float(expected.sum()), rel=0.3)


def test_more_bits_and_smaller_groups_cost_less(measured: Errors) -> None:
    for weight, errors in measured.items():
        assert errors[INT8_ROW] == min(errors.values()), weight
        assert list(errors) == list(sensitivity.candidates(weight, 1024 if "down" in weight else 256)), weight
    smallest, largest = sensitivity.CANDIDATES[0], sensitivity.CANDIDATES[3]
    linears = [errors for weight, errors in measured.items() if weight != TABLE]
    assert sum(errors[largest] for errors in linears) < 0.8 * sum(errors[smallest] for errors in linears)


def test_measured_again_it_is_the_same(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = Checkpoint.open(checkpoint("odd_sizes"))
    ids = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    steps: list[int] = []
    first = measure(source, ids, gptq, tmp_path, steps.append)
    assert sum(steps) == sensitivity.steps(4)
    assert measure(source, ids, gptq, tmp_path) == first
    sensitivity.save(first, tmp_path / "kept.json")
    assert sensitivity.load(tmp_path / "kept.json") == first
    for damaged in ("[" * 1000, "{", '{"a": [1]}', '{"a": 1}', "[]"):
        (tmp_path / "kept.json").write_text(damaged)
        assert sensitivity.load(tmp_path / "kept.json") is None, damaged
    keys = [
        sensitivity.key_of(source, some, method) for some in (ids, ids[:2]) for method in (gptq, lambda config: "rtn")
    ]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("shape", ["tiny", "gemma3_scaled", "gemma1"])
def test_one_window_serves_for_both(shape: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    errors = measure(Checkpoint.open(checkpoint(shape)), torch.arange(3, 27)[None], gptq, tmp_path)
    assert all(error > 0 for some in errors.values() for error in some.values())


def test_activations_that_overflow_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("tiny"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN or infinite"):
        measure(Checkpoint.open(folder), torch.arange(3, 27)[None], gptq, tmp_path)
