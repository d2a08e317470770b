"""A tied table rounded twice: once to be looked up, once to be multiplied by. Only our own readers see two matrices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import DEMO, hf_logits, hf_model, hf_quantized, make_checkpoint
from support.commands import refused, run

from gemma_edge.errors import InputError
from gemma_edge.export.api import open_model
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import Plan
from gemma_edge.model.checkpoint import HEAD, TABLE, Checkpoint
from gemma_edge.quantize.checkpoint.split_table import SplitTable, split_where_needed
from gemma_edge.quantize.checkpoint.store import TABLE_FILE, QuantizedCheckpoint, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import ANY, INT8_ROW, QuantConfig, QuantRule, Recipe, make_recipe

SPLIT = make_recipe(4, head_bits=4)


@pytest.fixture(scope="module")
def split(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    source = split_where_needed(open_weights(checkpoint()), SPLIT)
    return write_quantized(source, SPLIT, tmp_path_factory.mktemp("split") / "out")


def test_table_and_head_are_the_same_rows_in_their_own_integers(
    split: QuantizedCheckpoint, checkpoint: Callable[..., Path]
) -> None:
    original = load_file(checkpoint() / "model.safetensors")[f"{TABLE}.weight"].float()
    for weight, config, method in ((TABLE, INT8_ROW, "rtn"), (HEAD, QuantConfig(4, 32), "mse")):
        expected, stored = quantize(original, config, method), split.quantized(weight, 0, len(original))
        assert split.configs[weight] == config
        assert torch.equal(stored.codes, expected.codes) and torch.equal(stored.scale, expected.scale)
    assert split.num_parameters == Checkpoint.open(checkpoint()).num_parameters
    assert split.config.num_parameters == split.num_parameters + original.numel()


def test_transformers_sees_a_tied_model_with_its_float_table(
    split: QuantizedCheckpoint, checkpoint: Callable[..., Path]
) -> None:
    ids = torch.arange(3, 20)
    model = hf_quantized(split.folder)
    assert model.config.tie_word_embeddings and hf_logits(model, ids).isfinite().all()
    assert torch.equal(model.get_parameter(f"{TABLE}.weight"), hf_model(checkpoint()).get_parameter(f"{TABLE}.weight"))
    names = [name for shard in split.folder.glob("model-*.safetensors") for name in load_file(shard)]
    assert f"{TABLE}.weight" in names and not [name for name in names if name.startswith(HEAD)]


def test_a_split_folder_stays_what_it_is_when_it_is_written_again(split: QuantizedCheckpoint, tmp_path: Path) -> None:
    again = write_quantized(open_weights(split.folder), make_recipe(8), tmp_path / "again")
    assert again.split_table and not again.config.tie_word_embeddings and again.configs == split.configs
    assert (again.folder / TABLE_FILE).read_bytes() == (split.folder / TABLE_FILE).read_bytes()


@pytest.mark.parametrize(
    "recipe",
    [
        make_recipe(4),
        make_recipe(4, table_bits=4),
        make_recipe(4, head_bits=8),
        make_recipe(16),
        Recipe("float table", (QuantRule(TABLE, None, "mse"), QuantRule(ANY, QuantConfig(4, 32)))),
    ],
    ids=lambda recipe: recipe.name,
)
def test_a_table_that_becomes_one_matrix_stays_one(recipe: Recipe, checkpoint: Callable[..., Path]) -> None:
    source = open_weights(checkpoint())
    assert split_where_needed(source, recipe) is source


def test_a_float_table_may_stand_beside_a_head_of_integers_and_not_the_other_way_round(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, rules = open_weights(checkpoint()), (QuantRule(HEAD, QuantConfig(4, 32)), QuantRule(TABLE, None))
    recipe = Recipe("float table", (*rules, QuantRule(ANY, QuantConfig(4, 32))))
    made = write_quantized(split_where_needed(source, recipe), recipe, tmp_path / "out")
    assert made.split_table and made.configs[TABLE] is None and made.configs[HEAD] == QuantConfig(4, 32)
    turned = Recipe("float head", (QuantRule(HEAD, None), QuantRule(ANY, INT8_ROW)))
    with pytest.raises(InputError, match="the head shall stay float; give the head integers, too"):
        split_where_needed(source, turned)


@pytest.mark.parametrize("backend", ["onnx", "executorch", "tflite"])
def test_plan_counts_a_row_of_the_table_and_the_whole_head_for_each_token(backend: str) -> None:
    """The table had to be multiplied whole, and so to be read and held whole."""

    def plan(**bits: int) -> Plan:
        options = QuantizeOptions(quality="fast", **bits)  # type: ignore[arg-type]
        return open_model(ExportOptions(str(DEMO), quantization=options, backend=backend), plan_only=True).plans[
            backend
        ]

    rows, columns = 4096, 256
    tied, split = plan(), plan(head_bits=4, embedding_bits=8)
    head = rows * columns // 2 + rows * columns // 32 * 2  # in groups of 32, their scales in 16 bits
    assert tied.token_bytes >= tied.weights_bytes
    scales = 4 * rows * columns // 32  # at most, of the head
    assert head - 16 * rows <= split.weights_bytes - tied.weights_bytes <= head + scales
    saved = tied.token_bytes - split.token_bytes
    assert rows * columns - head - scales <= saved <= rows * columns - head + 16 * rows
    if backend != "tflite":  # whose graphs keep as much of each row as a row of the demo's table takes
        assert tied.device_ram_bytes > split.device_ram_bytes


def test_recipe_of_a_split_bundle_makes_it_again(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    options = ("--quality", "fast", "--head-bits", "4", "--embedding-bits", "8")
    first = run(folder, "-o", tmp_path / "a", "--verify", "none", *options)
    again = run(folder, "-o", tmp_path / "b", "--verify", "none", "--recipe", tmp_path / "a" / "manifest.json")
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    for name in ("model.onnx.data", "generate.onnx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["config"]["tie_word_embeddings"] is False and manifest["recipe"]["name"] == "int4-g32-head4"
    assert manifest["model"]["parameters"] == Checkpoint.open(folder).config.num_parameters
    read = manifest["backends"]["onnx"]["plan"]["token_bytes"]
    seen = " ".join(run("inspect", tmp_path / "a").output.split())
    assert f"{read / 1e3:.1f} kB of weights read per token" in seen


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--table-bits", "8", "--head-bits", "4"], ["--table-bits gives table and head", "--head-bits"]),
        (["--table-bits", "4", "--embedding-bits", "8"], ["--table-bits gives table and head", "--embedding-bits"]),
        (["--bits", "16", "--head-bits", "4"], ["--bits 16 leaves the weights float", "--head-bits"]),
        (["--bpw", "5", "--head-bits", "4"], ["--bpw decides", "--head-bits"]),
        (["--recipe", "nowhere.json", "--embedding-bits", "4"], ["--recipe decides", "--embedding-bits"]),
        (["--head-bits", "4", "--backend", "tflite-runtime", "--quality", "fast", "--bits", "8"], ["--head-bits 8"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bits_of_table_and_head_that_contradict_each_other_are_one_line(args: Sequence[str], parts: list[str]) -> None:
    refused(run("plan", DEMO, *args), *parts)


@pytest.mark.parametrize("option", ["--head-bits", "--table-bits", "--embedding-bits"])
def test_bits_of_integers_that_are_there_already_are_refused(option: str, tmp_path: Path) -> None:
    """--table-bits was ignored."""
    write_quantized(Checkpoint.open(DEMO), make_recipe(4), tmp_path / "integers")
    refused(run("plan", tmp_path / "integers", option, "4"), f"{option} 4 works on float weights", "leave it out")
    assert run("plan", tmp_path / "integers", option, "8").exit_code == 0


def test_a_recipe_whose_head_has_folds_is_refused(tmp_path: Path) -> None:
    rules = (QuantRule(HEAD, QuantConfig(4, 32), "awq"), QuantRule(TABLE, INT8_ROW), QuantRule(ANY, QuantConfig(4, 32)))
    (tmp_path / "recipe.json").write_text(json.dumps(Recipe("folded head", rules).to_json()))
    refused(run("plan", DEMO, "--recipe", tmp_path / "recipe.json"), "the head is quantized by awq", "supported: rtn")


def test_a_view_gives_the_table_under_both_names(checkpoint: Callable[..., Path]) -> None:
    source = open_weights(checkpoint())
    view = SplitTable(source)
    assert list(view.configs)[:2] == [TABLE, HEAD] and view.files() == source.files()
    assert torch.equal(view.matrix(HEAD), source.matrix(TABLE)) and view.dtype(HEAD) == source.dtype(TABLE)
