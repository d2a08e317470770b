"""Calibration of a head with integers of its own: they are fitted to what the final norm gives on real text.

A tied head is left alone: its rows are also looked up, and the first layer's integers are fitted to them before it is known what
the head will read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import FINAL_NORM, HEAD, Weights
from gemma_edge.model.safetensors_reader import SafetensorsFile
from gemma_edge.quantize.calibration.block import WITH_INPUTS
from gemma_edge.quantize.calibration.gptq import Inputs
from gemma_edge.quantize.checkpoint.safetensors_writer import plain_spec, write_safetensors
from gemma_edge.quantize.integers import QuantizedTensor
from gemma_edge.quantize.recipe import CALIBRATED, Recipe

HEAD_FILE = "head.safetensors"


def calibrates_head(source: Weights, recipe: Recipe) -> bool:
    """Whether the head's integers are fitted to what it reads."""
    rule = recipe.rule_for(HEAD)
    made = not source.config.tie_word_embeddings and source.configs[HEAD] is None and rule.config is not None
    return made and rule.method in CALIBRATED


def write_moment(source: Weights, x: Tensor, folder: Path) -> None:
    """Keep the second moment of what the head reads.

    Args:
        source: gives the final norm.
        x: (N, T, hidden), the last block's outputs.
        folder: the pass's.

    Raises:
        InputError: the activations are NaN or infinite.
    """
    scale, config = 1.0 + source.vector(FINAL_NORM), source.config
    moment = torch.zeros(config.hidden_size, config.hidden_size)
    for window in x:
        rows = F.rms_norm(window, (config.hidden_size,), scale, config.rms_norm_eps)
        moment.addmm_(rows.T, rows, alpha=1.0 / (x.shape[0] * x.shape[1]))
    if not moment.diagonal().isfinite().all():
        raise InputError("the activations that the head reads are NaN or infinite on the calibration text")
    write_safetensors(folder / HEAD_FILE, [plain_spec("moment", moment)])


def head_quantizer(folder: Path, recipe: Recipe) -> Callable[[Tensor], QuantizedTensor]:
    """A function that gives the integers of rows of the head, (rows, hidden), from the moment in a pass's folder.

    Scales are not refitted in rounds: that brought nothing to the real Gemma 3 270M, and takes ten times as long.
    """
    inputs = Inputs.from_hessian(SafetensorsFile(folder / HEAD_FILE).whole()["moment"])
    rule, config = recipe.rule_for(HEAD), recipe.config_for(HEAD, len(inputs.order))
    assert config is not None
    return partial(WITH_INPUTS[rule.method], inputs=inputs, config=config, rounds=0)
