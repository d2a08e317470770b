"""Budgets: what is asked for is kept, to the byte; what comes of it is data, and better than one configuration for all."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import DEMO, TEXTS, hf_holding, hf_logits, hf_model, make_checkpoint
from support.commands import refused, run
from torch import Tensor

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Opened, open_model
from gemma_edge.export.options import ExportOptions
from gemma_edge.model.checkpoint import Checkpoint, weight_shapes
from gemma_edge.quantize.calibration import text as calibration
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.mixed import choose as mixed
from gemma_edge.quantize.mixed import sensitivity
from gemma_edge.quantize.mixed import table as layers
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.quantize.recipe import INT8_ROW, QuantConfig, Recipe, make_recipe
from gemma_edge.text import corpus

HELD_OUT = tuple(TEXTS / name for name in corpus.HELD_OUT)


@pytest.fixture(scope="module", autouse=True)
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo, measured once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        opened(bpw=5.0)
        yield


def opened(**options: object) -> Opened:
    return open_model(ExportOptions(model=str(DEMO), quantization=QuantizeOptions(**options)), plan_only=True)  # type: ignore[arg-type]


def test_the_size_is_kept_and_used_and_a_larger_one_is_never_worse() -> None:
    errors = []
    for size in range(4_700_000, 8_400_000, 400_000):
        found = opened(size=str(size))
        assert found.choice is not None
        assert 0.99 * size < found.plans["onnx"].weights_bytes <= size
        errors.append(found.choice.predicted_kl)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]


def test_bits_per_weight_are_kept_and_used_and_counted_as_stored() -> None:
    shapes = weight_shapes(Checkpoint.open(DEMO).config)
    for bpw in (4.2, 4.5, 5.0, 7.9):
        choice = opened(bpw=bpw).choice
        assert choice is not None
        bits = 0
        for weight, option in choice.chosen.items():
            rows, columns = shapes[weight]
            scales = columns // option.config.group_size if option.config.group_size else 1
            bits += rows * (columns * option.config.bits + 16 * scales)
        exact = bits / sum(rows * columns for rows, columns in shapes.values())
        assert choice.bits_per_weight == pytest.approx(exact) and bpw - 0.02 < exact <= bpw
        assert choice.recipe.name == f"mixed-{exact:.2f}bpw"


def test_sizes_are_read_as_people_write_them() -> None:
    for text, count in (
        ("1.4GB", 1_400_000_000),
        ("900 mb", 900_000_000),
        ("1.5GiB", 3 << 29),
        ("5000000", 5_000_000),
    ):
        assert mixed.parse_size(text) == count
    for text in ("", "big", "-1GB", "1.4XB", "nan", "1e9"):
        with pytest.raises(InputError, match="^size "):
            mixed.parse_size(text)


def test_what_was_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity, "measure", measure)
    assert opened(size="5MB").recipe == opened(size="5MB").recipe
    with pytest.raises(AssertionError, match="measured again"):
        opened(size="5MB", calibration_text=CalibrationText(seed=1))


def held_out_kl(ids: Tensor, right: Tensor, recipe: Recipe, out: Path) -> float:
    """KL of transformers with the dequantized weights, to transformers with the original's."""
    quantized = write_quantized(Checkpoint.open(DEMO), recipe, out)
    weights = {f"{weight}.weight": quantized.matrix(weight) for weight in weight_shapes(quantized.config)}
    norms = {name: value for name, value in hf_model(DEMO).state_dict().items() if "norm" in name}
    model = hf_holding(DEMO, {**weights, **norms})
    said = torch.stack([hf_logits(model, window) for window in ids]).log_softmax(-1)
    return float((right.exp() * (right - said)).sum(-1).mean())


@pytest.mark.parametrize(("group_size", "part"), [(128, 1.0), (32, 0.95)])  # at 128 there is little to distribute
def test_at_the_same_bytes_it_is_better_than_one_configuration_for_all(
    group_size: int, part: float, tmp_path: Path
) -> None:
    uniform = opened(group_size=group_size, quality="fast")
    better = opened(size=str(uniform.plans["onnx"].weights_bytes), quality="fast")
    assert better.plans["onnx"].weights_bytes <= uniform.plans["onnx"].weights_bytes
    ids = calibration.windows(DEMO, 2, 512, CalibrationText(paths=HELD_OUT, tokens=1024))
    right = torch.stack([hf_logits(hf_model(DEMO), window) for window in ids]).log_softmax(-1)
    one_for_all = held_out_kl(ids, right, uniform.recipe, tmp_path / "uniform")
    assert held_out_kl(ids, right, better.recipe, tmp_path / "mixed") < part * one_for_all


def test_a_bundle_is_made_of_it_and_its_manifest_is_a_recipe(tmp_path: Path) -> None:
    options = ExportOptions(
        model=str(DEMO), out=tmp_path / "out", quantization=QuantizeOptions(size="5.1MB", quality="fast")
    )
    done = pipeline.export(options)
    assert 5_000_000 < (done.bundle / "model.onnx.data").stat().st_size <= 5_100_000
    assert done.manifest.verification["onnx"].passed
    assert len({(row.bits, row.group_size) for row in done.manifest.recipe.parts}) > 2
    again = opened(recipe=done.bundle / "manifest.json")
    assert again.recipe == opened(size="5.1MB", quality="fast").recipe and again.choice is None
    assert again.plans["onnx"].weights_bytes == done.manifest.backends["onnx"].plan.weights_bytes
    assert Manifest.load(done.bundle).recipe.name.startswith("mixed-")


def test_plan_shows_draws_and_saves_the_bits_of_every_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    recipe, drawing = tmp_path / "recipe.json", tmp_path / "bits.svg"
    shown = run("plan", DEMO, "--bpw", "4.9", "--save-recipe", recipe, "--plot", drawing)
    assert shown.exit_code == 0 and "8/row" in shown.stdout and "4/32" in shown.stdout
    assert "bits per weight" in shown.stdout and "nats per token" in shown.stdout
    as_json = json.loads(run("plan", DEMO, "--bpw", "4.9", "--json").stdout)
    assert set(as_json["mixed"]["weights"]) == set(weight_shapes(Checkpoint.open(DEMO).config))
    again = json.loads(run("plan", DEMO, "--recipe", recipe, "--json").stdout)
    assert again == {key: value for key, value in as_json.items() if key != "mixed"}
    texts = [element.text for element in ElementTree.parse(drawing).iter("{http://www.w3.org/2000/svg}text")]
    labels = {layers.label(QuantConfig(row["bits"], row["group_size"])) for row in as_json["mixed"]["weights"].values()}
    assert labels <= set(texts) and {"embed_tokens", "5", "q", "down"} <= set(texts)
    assert "4/32" in run("plan", DEMO, "--recipe", recipe).stdout


def test_a_drawing_without_matplotlib_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    drawing = tmp_path / "bits.svg"
    refused(run("plan", DEMO, "--plot", drawing), "--plot needs matplotlib", "pip install 'gemma-edge[eval]'")
    assert not drawing.exists()


@pytest.mark.parametrize("option", ["--save-recipe", "--plot"])
def test_an_interrupted_plan_leaves_the_file_that_was_there(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were written in place: an interruption left half of a recipe."""
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    file = tmp_path / "file"
    file.write_text("old")

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        assert run("plan", DEMO, option, file).exit_code == 130
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--bpw", "3"], ["--bpw 3;", "4.", "8.0", "bits per weight"]),
        (["--bpw", "43"], ["--bpw 43;", "bits per weight"]),
        (["--bpw", "nan"], ["--bpw nan", "bits per weight"]),
        (["--size", "1MB"], ["--size 1MB;", "bytes"]),
        (["--size", "1GB"], ["--size 1GB;", "bytes"]),
        (["--size", "small"], ["--size small", "1.4GB"]),
        (["--size", "5MB", "--bpw", "5"], ["--size decides", "--bpw"]),
        (["--bpw", "5", "--group-size", "32"], ["--bpw decides", "--group-size"]),
        (["--size", "5MB", "--table-bits", "8"], ["--size decides", "--table-bits"]),
        (["--size", "5MB", "--method", "magic"], ["--method magic", "rtn"]),
        (["--size", "5MB", "--quality", "utter"], ["--quality utter", "fast"]),
        (["--recipe", "nowhere.json", "--bits", "8"], ["--recipe decides", "--bits"]),
        (["--recipe", "nowhere.json"], ["nowhere.json", "--save-recipe"]),
        (["--bpw", "5", "--plot", "/nowhere/bits.svg"], ["/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else None,
)
def test_bad_budget_is_one_line(args: list[str], parts: list[str]) -> None:
    refused(run("plan", DEMO, *args), *parts)


def test_smallest_and_largest_that_are_named_can_be_had() -> None:
    line = run("plan", DEMO, "--size", "1").stderr
    low, high = line.split(" take ")[1].split(" bytes")[0].split(" to ")
    assert opened(size=low).plans["onnx"].weights_bytes <= int(low) and opened(size=high).plans[
        "onnx"
    ].weights_bytes <= int(high)
    line = run("plan", DEMO, "--bpw", "1").stderr
    low, high = line.split(" have ")[1].split(" bits")[0].split(" to ")
    most = opened(bpw=float(high)).choice
    assert opened(bpw=float(low)).choice is not None and most is not None
    assert sum(option.config == INT8_ROW for option in most.chosen.values()) > 40


def test_a_head_of_its_own_follows_a_recipe_as_the_table_does_and_no_budget(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "untied", num_hidden_layers=2, tie_word_embeddings=False)
    refused(run("plan", folder, "--bpw", "5"), "has a head of its own", "--bits")
    recipe = make_recipe(4, table_bits=4)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    found = mixed.read_recipe(tmp_path / "recipe.json", Checkpoint.open(folder))
    assert found.config_for("lm_head", 64) == found.config_for("model.embed_tokens", 64) == QuantConfig(4, 32)


def test_quantized_folders_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    write_quantized(Checkpoint.open(DEMO), make_recipe(4), tmp_path / "quantized")
    refused(run("plan", tmp_path / "quantized", "--bpw", "5"), "quantized already", "original float folder")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(DEMO / name)
    refused(run("plan", bare, "--bpw", "5"), "no tokenizer", "--group-size")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["JSON"]),
        ("{}", ["not a recipe"]),
        ('{"name": "x", "rules": [{"pattern": "(", "config": null, "method": "rtn"}], "float_bits": 32}', ["not a recipe"]),
        ('{"name": "x", "rules": [], "float_bits": 32}', ["no rule matches model.embed_tokens"]),
        ('{"name": "x", "rules": [{"pattern": ".*", "config": null, "method": "rtn"}], "float_bits": 7}', ["float_bits 7"]),
        (
            '{"name": "x", "rules": [{"pattern": ".*", "config": {"bits": 4, "group_size": 32, "symmetric": {}}}]}',
            ["not a recipe: rules[0].config.symmetric is an object; it must be true or false"],
        ),
        ('{"name": "x", "rules": {}, "float_bits": 32}', ["not a recipe: rules is an object; it must be a list"]),
        ('{"name": ["x"], "rules": [], "float_bits": 32}', ["not a recipe: name is a list"]),
        (
            '{"name": "x", "rules": [{"pattern": ".*", "config": {"bits": 4, "group_size": 32}, "method": "gptq"}],'
            ' "float_bits": 32}',
            ["the table is quantized by", "gptq"],
        ),
    ],
)  # fmt: skip
def test_bad_recipe_is_one_line(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    refused(run("plan", DEMO, "--recipe", path), "recipe.json", *parts)
