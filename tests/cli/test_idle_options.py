"""`gemma-export` refuses what nothing would heed, and names a way out that works; defaults never stand in the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from support.checkpoints import DEMO
from support.commands import refused, run

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import ANY, INT8_ROW, TABLE_PATTERN, QuantConfig, QuantRule, Recipe, make_recipe

V_FLOAT = Recipe(
    "v float",
    (QuantRule(r".*\.v_proj", None), QuantRule(TABLE_PATTERN, INT8_ROW), QuantRule(ANY, QuantConfig(4, 128))),
)


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized already, without scales of a KV cache."""
    return write_quantized(Checkpoint.open(DEMO), make_recipe(4), tmp_path_factory.mktemp("given") / "integers").folder


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one linear of each layer left float."""
    return write_quantized(Checkpoint.open(DEMO), V_FLOAT, tmp_path_factory.mktemp("given") / "partly").folder


IDLE = {
    "quality at 8 bits": ("--bits 8 --quality best", ["--quality best", "int8-channel", "--method gptq"]),
    "quality at 16 bits": ("--bits 16 --quality balanced", ["--quality balanced", "float16", "leave it out"]),
    "quality beside rounding": ("--method mse --quality best", ["--quality best", "int4-g32 without data"]),
    "distill at 16 bits": ("--bits 16 --distill 2048", ["--distill", "float16", "leave it out"]),
    "distill at 32 bits": ("--bits 32 --distill 2048", ["--distill", "float32", "leave it out"]),
    "int8 cache at 8 bits": ("--bits 8 --kv-bits 8", ["--kv-bits 8 needs", "use --method gptq, or --kv-bits 32"]),
    "int8 cache at 16 bits": ("--bits 16 --kv-bits 8", ["--kv-bits 8 needs", "float16; use --kv-bits 32"]),
}


@pytest.mark.parametrize(("args", "parts"), IDLE.values(), ids=IDLE.keys())
def test_what_nothing_would_heed_is_refused(args: str, parts: list[str], tmp_path: Path) -> None:
    """They were ignored; and the way to an int8 cache that was named, --quality balanced, is none at 8 bits."""
    refused(run(DEMO, "-o", tmp_path / "out", *args.split()), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    ["--bits 8", "--bits 16", "--bits 8 --quality fast", "--bits 8 --method gptq --quality best",
     "--bits 8 --method gptq --kv-bits 8", "--bits 4 --kv-bits 8", "--size 8.4MB --quality balanced"],
)  # fmt: skip
def test_what_is_heeded_or_not_asked_for_is_not_refused(args: str) -> None:
    """The last is a budget: it is what it decides itself, that every linear has 8 bits."""
    result = run("plan", DEMO, "--json", *args.split())
    assert result.exit_code == 0, result.output
    assert ("--kv-bits" not in args) or json.loads(result.stdout)["plans"]["onnx"]["kv_dtype"] == "int8"


GIVEN = {
    "distill": ("--distill 2048", ["--distill works on float weights", "quantized already"]),
    "quality": ("--quality best", ["--quality best works on float weights"]),
    "calibrated method": ("--method gptq", ["--method gptq works on float weights"]),
    "method": ("--method mse", ["--method mse works on float weights"]),
    "text": ("--calibration-tokens 512", ["quantized already", "leave out --calibration", "pass the float original"]),
    "cache": ("--kv-bits 8", ["holds none", "pass the float original, or --kv-bits 32"]),
}


@pytest.mark.parametrize(("args", "parts"), GIVEN.values(), ids=GIVEN.keys())
def test_what_works_on_float_weights_is_refused_for_integers(
    args: str, parts: list[str], integers: Path, tmp_path: Path
) -> None:
    """--distill did nothing, silently; for an int8 cache --quality and --method were named, which change nothing here."""
    refused(run(integers, "-o", tmp_path / "out", *args.split()), "float original", *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_integers_needs_no_options(integers: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run("plan", integers, "--json")
    assert (
        result.exit_code == 0
        and json.loads(result.stdout)["plans"]["onnx"]["recipe"] == "int4-g32"
        and not caplog.records
    )


def test_weights_left_float_in_a_quantized_folder_are_rounded_without_data(partly: Path, tmp_path: Path) -> None:
    """It was a KeyError: the default, gptq, is no method that rounds without calibration."""
    result = run(partly, "-o", tmp_path / "out", "--verify", "none")
    assert result.exit_code == 0, result.output
    assert Manifest.load(tmp_path / "out").recipe.name == "int4-g128+int4-g32"
    assert run("plan", partly, "--method", "mse").exit_code == 0
    refused(run("plan", partly, "--method", "gptq"), "--method gptq works on float weights", "float original")
