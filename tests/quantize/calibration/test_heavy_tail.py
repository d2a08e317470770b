"""The checkpoint with outliers that the tests of calibrated methods use: the same function, and harder to round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import DEMO, HFModel, hf_logits, hf_model, relative_error
from support.heavy_tail import write_heavy_tailed
from tokenizers import Tokenizer
from torch import Tensor

from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import QuantConfig

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heavy_tailed(DEMO, tmp_path_factory.mktemp("outliers") / "model")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor(
        [2, *Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids]
    )


def rounding_kl(model: HFModel, ids: Tensor) -> float:
    """KL(float || linears rounded at group 32), nats per token."""
    right = hf_logits(model, ids).log_softmax(-1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                weight.copy_(quantize(weight, QuantConfig(4, 32), "rtn").dequantize())
    said = hf_logits(model, ids).log_softmax(-1)
    return float((right.exp() * (right - said)).sum(-1).mean())


def test_outlier_channels_leave_the_logits_as_they_were(outliers: Path, ids: Tensor) -> None:
    original, scaled = hf_logits(hf_model(DEMO), ids), hf_logits(hf_model(outliers), ids)
    # Every product is rounded to float32 differently: 2^-24 = 6e-8 each, some hundreds of them in a row. Measured: 4e-7.
    assert relative_error(scaled, original) < 1e-5


def test_outlier_channels_make_rounding_much_worse(outliers: Path, ids: Tensor) -> None:
    assert rounding_kl(hf_model(outliers), ids) > 5 * rounding_kl(hf_model(DEMO), ids)  # measured: 14
