"""The space of a sweep: lists on the command line and in TOML, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.sweep.space import MAX_POINTS, combinations, name_of, options_of, read_space, values


def test_lists_become_every_combination_and_each_the_options_of_an_export() -> None:
    space = {"bits": values("bits", "4,8,4"), "method": values("method", "mse, awq+gptq"), "kv_bits": (32,)}
    choices = list(combinations(space))
    assert [tuple(choice.values()) for choice in choices] == [
        *((4, "mse", 32), (4, "awq+gptq", 32), (8, "mse", 32), (8, "awq+gptq", 32)),
    ]
    assert name_of(choices[1], space) == "bits 4, awq+gptq"
    base = ExportOptions(model="m", quantization=QuantizeOptions(calibration_text=CalibrationText(seed=3)))
    made = options_of({**choices[1], "calibration_tokens": 512}, base)
    text = CalibrationText(tokens=512, seed=3)
    assert made.quantization == QuantizeOptions(bits=4, method="awq+gptq", calibration_text=text)
    assert (made.kv_bits, made.model) == (32, "m")


def test_an_option_may_be_left_out_in_some_points() -> None:
    space = {"lora": values("lora", "none,a"), "vocab": values("vocab", "none"), "seed": (1, 2)}
    first, *_, last = combinations(space)
    assert (name_of(first, space), name_of(last, space)) == ("no lora, seed 1", "a, seed 2")
    made = [options_of(choice, ExportOptions()) for choice in (first, last)]
    assert [(each.lora, each.vocab, each.quantization.calibration_text.seed) for each in made] == [
        *((None, None, 1), ("a", None, 2)),
    ]


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("bits", "5", "bits 5; supported: 4, 8, 16, 32"),
        ("bits", "four", "bits four; supported"),
        ("method", "gptq,gptz", "method gptz; supported: rtn, mse"),
        ("group_size", "32,x", "group_size x; give integers, with commas"),
        ("group_size", [32.5], "group_size 32.5"),
        ("bits", [True], "bits True"),
        ("kv_bits", "16", "kv_bits 16; supported: 8, 32"),
        ("backend", "onnx,tf", "backend tf; supported: onnx"),
        ("bpw", "a", "bpw a; give numbers"),
        ("bits", " , ", "bits has no value"),
        ("bits", [], "bits has no value"),
    ],
)
def test_a_value_that_is_none_is_refused_with_what_is_allowed(name: str, given: object, part: str) -> None:
    with pytest.raises(InputError, match=part.replace("(", r"\(")):
        values(name, given)


def test_a_toml_file_holds_the_same_lists(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text('bits = [4, 8]\nbackend = "onnx,tflite"\nbpw = [4.5, 5]\n')
    assert read_space(path) == {"bits": (4, 8), "backend": ("onnx", "tflite"), "bpw": (4.5, 5.0)}


@pytest.mark.parametrize(("text", "part"), [("bits = [", "is not TOML"), ("bit = [4]", "bit; supported: bits")])
def test_a_toml_file_that_is_no_space_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=part):
        read_space(path)


@pytest.mark.parametrize(
    ("space", "part"),
    [({}, "the space is empty"), ({"bits": range(200), "group_size": range(200)}, f"at most {MAX_POINTS}")],
)
def test_a_space_of_no_points_or_too_many_is_refused(space: Any, part: str) -> None:
    with pytest.raises(InputError, match=part):
        list(combinations(space))
