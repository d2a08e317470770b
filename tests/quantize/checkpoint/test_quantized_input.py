"""Folders that are quantized already, ours and llm-compressor's: their integers are kept bit for bit, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from support.checkpoints import hf_holding, hf_logits, hf_quantized, llm_compressor_folder
from support.toys import edit_json
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import HEAD, TABLE, Checkpoint, weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, named_by_content, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import ANY, TABLE_PATTERN, QuantConfig, QuantRule, Recipe, make_recipe

IDS = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(0))  # (T,) three windows of 8
K_PROJ = "model.layers.2.self_attn.k_proj"  # (64, 64)


def integers_of(weights: QuantizedCheckpoint) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, config in weights.configs.items():
        if config is not None:
            part = weights.quantized(name, 0, weight_shapes(weights.config)[name][0])
            found[name] = part.codes, part.scale
    return found


def assert_same_integers(found: QuantizedCheckpoint, given: QuantizedCheckpoint) -> None:
    """Bit for bit, types included."""
    expected, others = integers_of(given), integers_of(found)
    assert expected
    for name, (codes, scale) in expected.items():
        assert_close(others[name][0], codes, rtol=0.0, atol=0.0)
        assert_close(others[name][1], scale, rtol=0.0, atol=0.0)
        assert found.scale_dtype(name) == given.scale_dtype(name)


RECIPES: dict[str, tuple[str, Recipe]] = {
    "int4": ("tiny", make_recipe(4)),
    "mixed groups": ("odd_sizes", make_recipe(4, group_size=64)),
    "int4 table": ("tiny", make_recipe(4, group_size=0, table_bits=4)),
    "int8": ("tiny", make_recipe(8)),
    "gemma1": ("gemma1", make_recipe(8)),
    "gemma3": ("gemma3_scaled", make_recipe(8)),
    "some float": (
        "tiny",
        Recipe("some", (QuantRule(r".*\.o_proj|" + TABLE_PATTERN, None), QuantRule(ANY, QuantConfig(4, 32)))),
    ),
}


# what the second folder is called: by what it holds, not by --bits 8 that it was made with
NAMES = {
    "int4": "int4-g32",
    "mixed groups": "int4-g32+int4-g64",
    "int4 table": "int4-channel-table4",
    "int8": "int8-channel",
    "gemma1": "int8-channel",
    "gemma3": "int8-channel",
    "some float": "int4-g32+int8-channel",
}


@pytest.mark.parametrize(
    ("shape", "recipe", "second_name"), [(*RECIPES[name], NAMES[name]) for name in RECIPES], ids=RECIPES.keys()
)
def test_integers_that_are_there_already_stay_bit_for_bit(
    shape: str, recipe: Recipe, second_name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    first = write_quantized(Checkpoint.open(checkpoint(shape)), recipe, tmp_path / "first")
    source = open_weights(tmp_path / "first")
    assert isinstance(source, QuantizedCheckpoint)
    second = write_quantized(source, make_recipe(8), tmp_path / "second")  # another recipe: only floats follow it
    assert_same_integers(second, first)
    assert named_by_content(source, make_recipe(8)).name == second_name
    for name, config in first.configs.items():
        assert second.configs[name] == (config or QuantConfig(8, 0))
    plain = (weights.plain_rows(TABLE, 0, 320) for weights in (second, first))
    assert_close(*plain, rtol=0.0, atol=0.0)


GIVEN = [
    (QuantConfig(4, 0), torch.float32),
    (QuantConfig(4, 0), torch.bfloat16),
    (QuantConfig(8, 0), torch.float16),
    (QuantConfig(4, 32), torch.float16),
    (QuantConfig(8, 32), torch.bfloat16),
]


def test_scales_with_more_digits_than_a_backend_keeps_are_named(
    checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They were rounded without a word."""
    folder = llm_compressor_folder(checkpoint("tiny"), tmp_path / "given", QuantConfig(4, 32), torch.float16)
    given = open_weights(folder)
    assert isinstance(given, QuantizedCheckpoint)
    weight = "model.layers.0.mlp.up_proj"
    given.check_scales([weight], torch.float16, "tflite")
    assert not caplog.records
    given.check_scales([weight], torch.bfloat16, "executorch")
    assert "executorch stores such scales in bfloat16: those of 1 weights" in caplog.text and "0.39 %" in caplog.text


@pytest.mark.parametrize("shape", ["tiny", "gemma1", "gemma3_scaled"])
@pytest.mark.parametrize(("config", "scale_dtype"), GIVEN)
def test_integers_of_llm_compressor_stay_bit_for_bit(
    config: QuantConfig, scale_dtype: torch.dtype, shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llm_compressor_folder(checkpoint(shape), tmp_path / "given", config, scale_dtype)
    given = open_weights(folder)
    assert isinstance(given, QuantizedCheckpoint)
    assert {name: kept for name, kept in given.configs.items() if name != TABLE} == {
        name: config for name in weight_shapes(given.config) if name != TABLE
    }
    assert given.configs[TABLE] is None
    written = write_quantized(given, make_recipe(4), tmp_path / "out")
    assert_same_integers(written, given)
    assert written.configs[TABLE] == QuantConfig(8, 0)  # the table follows the recipe
    table = quantize(given.matrix(TABLE), QuantConfig(8, 0), "rtn")
    assert_close(written.matrix(TABLE), table.dequantize(), rtol=0.0, atol=0.0)
    # and transformers reads the same model from both folders
    assert_close(
        hf_logits(hf_quantized(tmp_path / "out"), IDS), hf_logits(hf_quantized(folder), IDS), rtol=0.0, atol=0.0
    )


@pytest.mark.parametrize("shape", ["tiny", "gemma1", "gemma3_scaled"])
@pytest.mark.parametrize(("config", "scale_dtype"), GIVEN)
def test_integers_of_llm_compressor_are_dequantized_as_transformers_does(
    config: QuantConfig, scale_dtype: torch.dtype, shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llm_compressor_folder(checkpoint(shape), tmp_path / "given", config, scale_dtype)
    weights = QuantizedCheckpoint.open(folder)
    state = {name: value for name, value in weights.load().state_dict().items() if "inv_freq" not in name}
    ours = hf_logits(hf_holding(checkpoint(shape), state), IDS)
    assert_close(hf_logits(hf_quantized(folder), IDS), ours, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("config", "scale_dtype"), GIVEN)
@pytest.mark.parametrize("announced", [True, False])
def test_a_head_of_integers_stays_bit_for_bit(
    announced: bool, config: QuantConfig, scale_dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """It was refused. Whatever config.json says, it is a matrix of its own."""
    folder = llm_compressor_folder(checkpoint("untied"), tmp_path / "given", config, scale_dtype, ignore=())
    expected = hf_logits(hf_quantized(folder), IDS)
    edit_json(folder / "config.json", tie_word_embeddings=announced)
    given = open_weights(folder)
    assert isinstance(given, QuantizedCheckpoint)
    assert not given.config.tie_word_embeddings and given.configs[HEAD] == config and given.configs[TABLE] is None
    state = {name: value for name, value in given.load().state_dict().items() if name != "model.inv_freq"}
    assert_close(hf_logits(hf_holding(checkpoint("untied"), state), IDS), expected, rtol=0.0, atol=0.0)
    written = write_quantized(given, make_recipe(4), tmp_path / "out")
    assert_same_integers(written, given)
    assert written.configs[TABLE] == QuantConfig(8, 0)
    assert_close(hf_logits(hf_quantized(tmp_path / "out"), IDS), expected, rtol=0.0, atol=0.0)


def test_a_table_of_integers_stays_bit_for_bit(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = llm_compressor_folder(checkpoint("tiny"), tmp_path / "given", QuantConfig(4, 32), torch.bfloat16)
    state = load_file(folder / "model.safetensors")
    name = state.pop(f"{TABLE}.weight")
    rows, columns = name.shape
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    state[f"{TABLE}.weight_packed"] = pack_to_int32(codes, 4)
    state[f"{TABLE}.weight_scale"] = torch.rand(rows, 2).bfloat16() + 0.01
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    given = open_weights(folder)
    assert isinstance(given, QuantizedCheckpoint)
    assert given.config.tie_word_embeddings and given.configs[TABLE] == QuantConfig(4, 32)
    written = write_quantized(given, make_recipe(8), tmp_path / "out")
    assert_same_integers(written, given)
    assert_close(written.plain_rows(TABLE, 0, rows), given.matrix(TABLE), rtol=0.0, atol=0.0)


def test_channel_scales_without_a_second_axis_are_read(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = llm_compressor_folder(checkpoint("tiny"), tmp_path / "given", QuantConfig(8, 0), torch.float32)
    expected = QuantizedCheckpoint.open(folder).matrix(K_PROJ)
    state = load_file(folder / "model.safetensors")
    state[f"{K_PROJ}.weight_scale"] = state[f"{K_PROJ}.weight_scale"].flatten()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    written = write_quantized(open_weights(folder), make_recipe(4), tmp_path / "out")
    assert written.configs[K_PROJ] == QuantConfig(8, 0)
    assert_close(written.matrix(K_PROJ), expected, rtol=0.0, atol=0.0)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def group(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["quantization_config"]["config_groups"]["group_0"]
    return found


def replaced(part: str, value: Tensor) -> Change:
    return lambda raw, state: state.update({f"{K_PROJ}.{part}": value})


def cast(part: str, dtype: torch.dtype) -> Change:
    return lambda raw, state: state.update({f"{K_PROJ}.{part}": state[f"{K_PROJ}.{part}"].to(dtype)})


REFUSED: list[Any] = [
    pytest.param(
        lambda raw, state: raw["quantization_config"].update(quant_method="hqq"), '"hqq" / "pack-quantized"', id="hqq"
    ),
    pytest.param(
        lambda raw, state: raw.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        '"bitsandbytes" / null; supported: compressed-tensors / pack-quantized, gptq and awq',
        id="bitsandbytes",
    ),
    pytest.param(
        lambda raw, state: raw["quantization_config"].update(format="int-quantized"), "int-quantized", id="format"
    ),
    pytest.param(
        lambda raw, state: group(raw).update(input_activations={"num_bits": 8, "type": "int"}),
        "group_0 is not weight-only symmetric integers",
        id="activations",
    ),
    pytest.param(lambda raw, state: group(raw)["weights"].update(symmetric=False), "group_0 is not", id="asymmetric"),
    pytest.param(lambda raw, state: group(raw)["weights"].update(type="float"), "group_0 is not", id="floats"),
    pytest.param(lambda raw, state: group(raw).update(weights=None), "group_0 is not", id="activations only"),
    pytest.param(
        replaced("weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)),
        f"{K_PROJ} has a weight_zero_point; only symmetric, ordered groups are supported",
        id="zero point",
    ),
    pytest.param(
        replaced("weight_g_idx", torch.zeros(64, dtype=torch.int32)), f"{K_PROJ} has a weight_g_idx", id="g_idx"
    ),
    pytest.param(
        lambda raw, state: state.update({f"{K_PROJ}.bias": torch.zeros(64)}),
        f"holds {K_PROJ}.bias, which Gemma2ForCausalLM does not have",
        id="a bias",
    ),
    pytest.param(
        lambda raw, state: state.pop(f"{K_PROJ}.weight_scale"), f"{K_PROJ}.weight_scale is missing", id="no scale"
    ),
    pytest.param(lambda raw, state: state.pop(f"{K_PROJ}.weight_packed"), f"{K_PROJ}.weight is missing", id="no codes"),
    pytest.param(
        replaced("weight_packed", torch.zeros(63, 8, dtype=torch.int32)),
        f"{K_PROJ} has packed shape [63, 8]",
        id="rows of codes",
    ),
    pytest.param(
        replaced("weight_packed", torch.zeros(64, 9, dtype=torch.int32)), "packed shape [64, 9]", id="width of codes"
    ),
    pytest.param(
        replaced("weight_packed", torch.zeros(64, 4, dtype=torch.int32)), "packed shape [64, 4]", id="two bits"
    ),
    pytest.param(replaced("weight_scale", torch.ones(32, 2)), "scales [32, 2]", id="rows of scales"),
    pytest.param(replaced("weight_scale", torch.ones(64, 3)), "scales [64, 3]", id="groups that do not divide"),
    pytest.param(
        lambda raw, state: state.update({f"{HEAD}.weight_packed": torch.zeros(320, 8, dtype=torch.int32)}),
        f"{HEAD}.weight_scale is missing",
        id="a head without scales",
    ),
    pytest.param(lambda raw, state: state.pop("model.norm.weight"), "model.norm.weight is missing", id="no final norm"),
    pytest.param(cast("weight_packed", torch.int64), K_PROJ, id="wide codes"),
    pytest.param(cast("weight_scale", torch.int32), K_PROJ, id="integer scales"),
    pytest.param(replaced("weight_scale", torch.ones(64, 16)), K_PROJ, id="groups of four"),
    pytest.param(replaced("weight_packed", torch.zeros(512, dtype=torch.int32)), K_PROJ, id="flat codes"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_cannot_be_taken_over_exactly_is_refused_by_name(
    change: Change, words: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llm_compressor_folder(checkpoint("tiny"), tmp_path / "given", QuantConfig(4, 32), torch.bfloat16)
    raw, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(raw, state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as caught:
        open_weights(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_scales_that_are_not_finite_are_named_when_read(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = llm_compressor_folder(checkpoint("tiny"), tmp_path / "given", QuantConfig(4, 32), torch.float16)
    state = load_file(folder / "model.safetensors")
    state[f"{K_PROJ}.weight_scale"][-1, -1] = torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{K_PROJ}\.weight_scale holds NaN or infinite"):
        write_quantized(open_weights(folder), make_recipe(4), tmp_path / "out")


def test_a_lora_does_not_go_into_integers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = llm_compressor_folder(checkpoint("tiny"), tmp_path / "given", QuantConfig(4, 32), torch.bfloat16)
    with pytest.raises(InputError, match="is already quantized; a LoRA can only be merged into float weights"):
        open_weights(folder, lora=tmp_path)


def test_a_folder_without_a_quantization_is_read_as_floats(checkpoint: Callable[..., Path]) -> None:
    assert isinstance(open_weights(checkpoint("tiny")), Checkpoint)


def test_a_quantization_that_is_null_is_none(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """With a LoRA the folder was refused as quantized already."""
    folder = Path(shutil.copytree(checkpoint("tiny"), tmp_path / "model"))
    edit_json(folder / "config.json", quantization_config=None)
    assert isinstance(open_weights(folder), Checkpoint)
    with pytest.raises(InputError, match="has no adapter_config.json"):
        open_weights(folder, lora=tmp_path)


FORMAT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("int4", r'quantization_config is "int4"; it must be an object'),
        ([], "quantization_config is a list"),
        ({}, "is quantized as null / null"),
        ({**FORMAT, "config_groups": []}, "quantization_config.config_groups is a list"),
        ({**FORMAT, "config_groups": {"a": 1}}, "quantization_config.config_groups.a is 1"),
        ({**FORMAT, "config_groups": {"a": {"weights": [4]}}}, "config_groups.a.weights is a list"),
        ({**FORMAT, "config_groups": {"a": {"weights": {"symmetric": 1}}}}, "a.weights.symmetric is 1"),
        ({"quant_method": "gptq", "bits": 4.0}, "weights of 4.0 bits"),
    ],
)
def test_a_quantization_of_another_type_is_named(
    value: object, words: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("tiny"), tmp_path / "model"))
    edit_json(folder / "config.json", quantization_config=value)
    with pytest.raises(InputError, match=words):
        open_weights(folder)


@pytest.mark.parametrize(("text", "words"), [(None, "has no config.json"), ("{", "is not valid JSON")])
def test_a_broken_config_is_named(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        open_weights(tmp_path)
