"""The quantized checkpoint, judged by transformers with compressed-tensors: they load it and compute the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
    pack_to_int32,
    unpack_from_int32,
)
from safetensors.torch import load_file
from support.checkpoints import DEMO, hf_holding, hf_logits, hf_model, hf_quantized, make_checkpoint
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2ForCausalLM

from gemma_edge.model import checkpoint as reader
from gemma_edge.model.checkpoint import TABLE, Checkpoint, norm_names, weight_shapes
from gemma_edge.quantize.checkpoint.packing import pack, unpack
from gemma_edge.quantize.checkpoint.store import TABLE_FILE, QuantizedCheckpoint, final_configs, open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.integers import quantize
from gemma_edge.quantize.recipe import ANY, QuantConfig, QuantRule, Recipe, make_recipe

IDS = torch.randint(3, 320, (24,), generator=torch.Generator().manual_seed(0))  # (T,) three windows of 8
SOME_FLOAT = Recipe(
    "some float",
    (
        QuantRule(r".*\.o_proj", None),
        QuantRule(r"model\.layers\.0\..*", QuantConfig(8, 0)),
        QuantRule(TABLE, None),
        QuantRule(ANY, QuantConfig(4, 32), "mse"),
    ),
)
ONE_GROUP_AND_FLOAT = Recipe(
    "one group and float", (QuantRule(r".*\.o_proj", None), QuantRule(ANY, QuantConfig(4, 32)))
)
# shape, recipe. odd_sizes has rows of 96, 160 and 192, so that groups of 64 become 64, 32 and 96 beside each other.
RECIPES: dict[str, tuple[str, Recipe]] = {
    "int4": ("tiny", make_recipe(4)),
    "int4 mixed groups": ("odd_sizes", make_recipe(4, group_size=64)),
    "int4 channel": ("tiny", make_recipe(4, group_size=0)),
    "int4 with int4 table": ("tiny", make_recipe(4, table_bits=4)),
    "int8": ("tiny", make_recipe(8)),
    "gemma1 int4": ("gemma1", make_recipe(4)),
    "gemma3 int4": ("gemma3_scaled", make_recipe(4)),
    "int8 groups": ("odd_sizes", make_recipe(8, group_size=32)),
    "some float": ("tiny", SOME_FLOAT),
    "untied int4": ("untied", make_recipe(4)),
    "untied int4 with int4 table": ("untied", make_recipe(4, table_bits=4)),
    "untied some float": ("untied", SOME_FLOAT),
    "one group and float": ("tiny", ONE_GROUP_AND_FLOAT),
}
by_recipe = pytest.mark.parametrize(("shape", "recipe"), RECIPES.values(), ids=RECIPES.keys())


def stored(folder: Path) -> dict[str, Tensor]:
    """What transformers sees: the table's file is not in the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: load_file(folder / file)[name] for name, file in index.items()}
    on_disk = {name for path in folder.glob("model-*.safetensors") for name in load_file(path)}
    assert on_disk == set(found)
    return found


def seen_by_transformers(weights: QuantizedCheckpoint) -> dict[str, Tensor]:
    """Our dequantized linears, and the plain table and head."""
    matrices = {f"{name}.weight": weights.matrix(name) for name in weight_shapes(weights.config)}
    plain = {
        f"{name}.weight": stored(weights.folder)[f"{name}.weight"].float() for name in (TABLE, weights.config.head)
    }
    return matrices | plain | {name: weights.vector(name) for name in norm_names(weights.config)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 9, 31, 32, 33, 96])
def test_packing_is_that_of_compressed_tensors(bits: int, columns: int) -> None:
    high = 1 << (bits - 1)
    codes = torch.randint(-high, high, (5, columns), generator=torch.Generator().manual_seed(columns)).to(torch.int8)
    codes[0, 0], codes[1, 0] = -high, high - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-columns * bits // 32))
    assert_close(packed, pack_to_int32(codes, bits), rtol=0.0, atol=0.0)
    assert_close(unpack(packed, bits, columns), codes, rtol=0.0, atol=0.0)
    assert_close(unpack_from_int32(packed, bits, codes.shape), codes, rtol=0.0, atol=0.0)


def test_unpacking_reads_what_it_is_given_however_that_lies_in_memory() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 2)
    codes[1] = 3
    packed = pack(codes, 4)
    assert_close(unpack(packed[1::2], 4, 32), codes[1::2], rtol=0.0, atol=0.0)
    assert_close(unpack(packed.t().contiguous().t(), 4, 32), codes, rtol=0.0, atol=0.0)


@by_recipe
def test_transformers_computes_the_same_logits_from_the_folder(
    shape: str, recipe: Recipe, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = checkpoint(shape)
    weights = write_quantized(Checkpoint.open(original), recipe, tmp_path)
    ours = hf_logits(hf_holding(original, seen_by_transformers(weights)), IDS)
    assert_close(hf_logits(hf_quantized(tmp_path), IDS), ours, rtol=0.0, atol=0.0)  # the same weights in the same code
    assert not torch.equal(ours, hf_logits(hf_model(original), IDS))


def test_rows_that_fill_no_whole_word_are_read_by_transformers(tmp_path: Path) -> None:
    """Rows of 36, 40 and 44 codes of four bits end in the middle of an int32."""
    sizes = {"hidden_size": 36, "intermediate_size": 44, "head_dim": 10, "query_pre_attn_scalar": 10}
    original = make_checkpoint(tmp_path / "float", **sizes)
    weights = write_quantized(Checkpoint.open(original), make_recipe(4, group_size=0), tmp_path / "int4")
    ours = hf_logits(hf_holding(original, seen_by_transformers(weights)), IDS)
    assert_close(hf_logits(hf_quantized(tmp_path / "int4"), IDS), ours, rtol=0.0, atol=0.0)


@by_recipe
def test_the_folder_holds_the_integers_of_the_recipe(
    shape: str, recipe: Recipe, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = Checkpoint.open(checkpoint(shape))
    weights = write_quantized(source, recipe, tmp_path)
    expected = recipe.configs(weight_shapes(source.config))
    assert weights.configs == expected == final_configs(source, recipe)
    for name, config in expected.items():
        values = source.matrix(name)
        if config is None:
            assert_close(weights.matrix(name), values, rtol=0.0, atol=0.0)
            continue
        integers = quantize(values, config, recipe.rule_for(name).method)
        found = weights.quantized(name, 0, len(values))
        assert found.config == config
        assert_close(found.codes, integers.codes, rtol=0.0, atol=0.0)
        assert_close(found.scale, integers.scale, rtol=0.0, atol=0.0)
        assert_close(weights.rows(name, 3, 7), integers.dequantize()[3:7], rtol=0.0, atol=0.0)
    for name in norm_names(source.config):
        assert_close(weights.vector(name), source.vector(name), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("shape", ["tiny", "untied"])
@pytest.mark.parametrize("table_bits", [4, 8])
def test_the_quantized_table_lies_only_where_transformers_does_not_look(
    table_bits: int, shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers cannot load a quantized embedding, so it gets the plain one, and a plain head of its own."""
    source = Checkpoint.open(checkpoint(shape))
    weights = write_quantized(source, make_recipe(4, table_bits=table_bits), tmp_path)
    names = dict.fromkeys((TABLE, source.config.head))
    parts = {f"{name}.{part}" for name in names for part in ("weight_packed", "weight_scale", "weight_shape")}
    assert set(load_file(tmp_path / TABLE_FILE)) == parts
    assert not parts & set(stored(tmp_path))
    for name in names:
        plain = stored(tmp_path)[f"{name}.weight"]
        assert_close(plain, source.matrix(name), rtol=0.0, atol=0.0)
        assert_close(weights.plain_rows(name, 0, 320), plain, rtol=0.0, atol=0.0)
        assert not torch.equal(weights.matrix(name), plain)


def test_slices_do_not_show_in_the_files(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = Checkpoint.open(checkpoint("odd_sizes")), make_recipe(4)
    write_quantized(source, recipe, tmp_path / "whole")
    asked: list[int] = []
    rows = Checkpoint.rows

    def recorded(self: Checkpoint, weight: str, start: int, stop: int) -> Tensor:
        asked.append((stop - start) * weight_shapes(self.config)[weight][1] * 4)
        return rows(self, weight, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", recorded)
    monkeypatch.setattr(reader, "SLICE_BYTES", 4000)
    write_quantized(source, recipe, tmp_path / "sliced")
    assert max(asked) <= 4000 and len(asked) > 200  # never more of a matrix in memory than a slice
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "sliced").iterdir()}
    for name in names:
        assert (tmp_path / "sliced" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_progress_adds_up_to_the_weights_that_were_quantized(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = Checkpoint.open(checkpoint("tiny"))
    done: list[int] = []
    write_quantized(source, make_recipe(4), tmp_path, done.append)
    assert sum(done) == sum(rows * columns for rows, columns in weight_shapes(source.config).values())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_quantized(Checkpoint.open(DEMO), make_recipe(8), tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
    assert open_weights(tmp_path).config == Checkpoint.open(DEMO).config


def saved_as(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("bits", "dtype", "expected"),
    [
        (16, torch.float32, torch.bfloat16),
        (16, torch.bfloat16, torch.bfloat16),
        (16, torch.float16, torch.float16),  # 16 bits already, and rounding to others would lose some
        (32, torch.float32, torch.float32),
        (32, torch.bfloat16, torch.bfloat16),  # exact, and half the file
        (32, torch.float16, torch.float16),
    ],
)
def test_float_weights_are_stored_as_they_were_or_in_16_bits(
    bits: int, dtype: torch.dtype, expected: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = Checkpoint.open(saved_as(checkpoint("tiny"), tmp_path / "source", dtype))
    weights = write_quantized(source, make_recipe(bits), tmp_path / "out")
    tensors = stored(tmp_path / "out")
    assert not (tmp_path / "out" / TABLE_FILE).exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name in weight_shapes(source.config):
        assert tensors[f"{name}.weight"].dtype == weights.dtype(name) == expected
        assert_close(weights.matrix(name), source.matrix(name).to(expected).float(), rtol=0.0, atol=0.0)
    for name in norm_names(source.config):
        assert tensors[name].dtype == torch.float32
        assert_close(weights.vector(name), source.vector(name), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_plain_table_keeps_its_type_beside_integers(
    dtype: torch.dtype, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = Checkpoint.open(saved_as(checkpoint("tiny"), tmp_path / "source", dtype))
    write_quantized(source, make_recipe(4), tmp_path / "out")
    assert stored(tmp_path / "out")[f"{TABLE}.weight"].dtype == dtype
