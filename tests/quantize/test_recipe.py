"""Recipes are data: the first rule that matches wins, groups are fitted to the rows, impossible values are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.model.config import GEMMA2_2B, PRESETS
from gemma_edge.quantize.recipe import ANY, QuantConfig, QuantRule, Recipe, make_recipe

TABLE, HEAD, Q_PROJ = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.11.mlp.down_proj"
INT4, INT8 = QuantConfig(4, 32), QuantConfig(8, 0)


def test_the_first_rule_that_matches_wins() -> None:
    recipe = Recipe(
        "test",
        (
            QuantRule(r"model\.layers\.0\..*", None),
            QuantRule(r".*\.down_proj", INT8),
            QuantRule(r"model\.layers\..*", INT4, "mse"),
            QuantRule(ANY, None),
        ),
    )
    assert recipe.config_for(Q_PROJ, 64) is None
    assert recipe.config_for("model.layers.0.mlp.down_proj", 64) is None
    assert recipe.config_for(DOWN_PROJ, 64) == INT8
    assert recipe.config_for("model.layers.1.mlp.up_proj", 64) == INT4
    assert recipe.rule_for("model.layers.1.mlp.up_proj").method == "mse"
    assert recipe.config_for(TABLE, 64) is None


def test_a_pattern_must_match_the_whole_name() -> None:
    """Else a rule for layer 1 would also take layers 10 to 19."""
    recipe = Recipe("test", (QuantRule(r"model\.layers\.1\.mlp\.down_proj", INT4), QuantRule(ANY, None)))
    assert recipe.config_for("model.layers.1.mlp.down_proj", 64) == INT4
    for name in (
        "model.layers.11.mlp.down_proj",
        "model.layers.1.mlp.down_proj.base",
        "x.model.layers.1.mlp.down_proj",
    ):
        assert recipe.config_for(name, 64) is None


@pytest.mark.parametrize(
    ("group", "row", "fitted"),
    [
        (128, 2304, 128),  # 2B: nothing to change
        (128, 96, 96),  # a row shorter than a group is one group
        (128, 160, 32),  # 160 = 5 * 32: neither 128 nor 96 nor 64 divides it
        (128, 192, 96),
        (96, 2304, 96),
        (64, 96, 32),
        (32, 9216, 32),
        (1024, 640, 640),
        (0, 40, 0),  # per channel takes any row
    ],
)
def test_groups_are_the_largest_that_divide_the_row(group: int, row: int, fitted: int) -> None:
    assert QuantConfig(4, group).fit(row) == QuantConfig(4, fitted)


@pytest.mark.parametrize("row", [40, 16, 100])
def test_rows_that_no_group_divides_are_refused(row: int) -> None:
    with pytest.raises(InputError, match=rf"rows of {row} cannot be cut .*group_size 0"):
        QuantConfig(4, 32).fit(row)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "words"),
    [
        (4, 48, True, r"group size 48 is not a multiple of 32.*use group_size (32|64), or 0"),
        (4, 1, True, r"group size 1 is not a multiple of 32.*use group_size 32"),
        (4, 100, True, "use group_size 96"),
        (4, -32, True, "group size -32"),
        (5, 32, True, "5 bits; quantized weights have 4 or 8"),
        (16, 0, True, "16 bits; quantized weights have 4 or 8"),
        (4, 32, False, "asymmetric weights"),
    ],
)
def test_integers_that_not_every_backend_runs_are_refused(bits: int, group: int, symmetric: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        QuantConfig(bits, group, symmetric)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="method 'gguf'; supported: rtn, mse"):
        QuantRule(ANY, INT4, "gguf")
    with pytest.raises(InputError, match="method 'gguf'"):
        make_recipe(4, method="gguf")


@pytest.mark.parametrize(
    ("bits", "group", "name", "config", "method"),
    [
        (4, None, "int4-g32", QuantConfig(4, 32), "mse"),  # without calibration only small groups are good enough
        (4, 128, "int4-g128", QuantConfig(4, 128), "mse"),
        (4, 0, "int4-channel", QuantConfig(4, 0), "rtn"),
        (8, None, "int8-channel", QuantConfig(8, 0), "rtn"),
        (8, 64, "int8-g64", QuantConfig(8, 64), "rtn"),
    ],
)
def test_a_command_line_becomes_a_recipe(
    bits: int, group: int | None, name: str, config: QuantConfig, method: str
) -> None:
    recipe = make_recipe(bits, group_size=group)
    assert recipe.name == name
    for weight in (Q_PROJ, DOWN_PROJ):
        assert recipe.config_for(weight, 9216) == config
        assert recipe.rule_for(weight).method == method
    assert recipe.config_for(TABLE, 2304) == INT8
    assert recipe.rule_for(TABLE).method == "rtn"


def test_a_method_that_is_asked_for_is_taken() -> None:
    assert make_recipe(4, method="rtn").rule_for(Q_PROJ).method == "rtn"
    assert make_recipe(8, method="mse").rule_for(Q_PROJ).method == "mse"


def test_a_table_of_four_bits_takes_the_groups_of_the_body() -> None:
    assert make_recipe(4, group_size=128, table_bits=4).config_for(TABLE, 2304) == QuantConfig(4, 128)
    assert make_recipe(4, group_size=0, table_bits=4).config_for(TABLE, 2304) == QuantConfig(4, 32)
    assert make_recipe(4, table_bits=4).name == "int4-g32-table4"


@pytest.mark.parametrize(
    ("options", "head", "method", "name"),
    [
        ({"quality": "balanced"}, QuantConfig(4, 128), "gptq", "int4-g128-head4"),
        ({"quality": "best"}, QuantConfig(4, 128), "gptq", "int4-g128-head4"),  # no fold reaches the final norm
        ({"quality": "best", "group_size": 0}, QuantConfig(4, 0), "gptq", "int4-channel-head4"),
        ({"quality": "fast"}, QuantConfig(4, 32), "mse", "int4-g32-head4"),
        ({"quality": "fast", "group_size": 0}, QuantConfig(4, 32), "rtn", "int4-channel-head4"),
        ({"method": "awq"}, QuantConfig(4, 128), "hscale", "int4-g128-head4"),
        ({"table_bits": 4, "quality": "balanced"}, QuantConfig(4, 128), "gptq", "int4-g128-table4"),
    ],
    ids=str,
)
def test_a_head_of_four_bits_has_a_rule_of_its_own(
    options: dict[str, Any], head: QuantConfig, method: str, name: str
) -> None:
    """A head became whatever the table became, whichever rule named it."""
    recipe = make_recipe(4, head_bits=4, **options)
    assert (recipe.config_for(HEAD, 2304), recipe.rule_for(HEAD).method, recipe.name) == (head, method, name)
    assert recipe.rule_for(TABLE) == make_recipe(4, **options).rule_for(TABLE)


def test_a_head_beside_int8_linears_is_calibrated_in_groups() -> None:
    recipe = make_recipe(8, head_bits=4, quality="balanced")
    assert recipe.rule_for(HEAD) == QuantRule("lm_head", QuantConfig(4, 128), "gptq") and recipe.calibrated
    assert recipe.rule_for(Q_PROJ).config == INT8


@pytest.mark.parametrize("bits", [16, 32])
def test_16_and_32_bits_leave_everything_float(bits: int) -> None:
    recipe = make_recipe(bits)
    assert (recipe.name, recipe.float_bits) == (f"float{bits}", bits)
    assert set(recipe.configs(weight_shapes(GEMMA2_2B)).values()) == {None}


@pytest.mark.parametrize("bits", [16, 32])
def test_options_of_integers_do_not_go_with_floats(bits: int) -> None:
    words = f"bits {bits} leaves the weights float: group_size, method, table_bits, embedding_bits and head_bits"
    with pytest.raises(InputError, match=words):
        make_recipe(bits, group_size=32)
    with pytest.raises(InputError, match=words):
        make_recipe(bits, group_size=0)
    with pytest.raises(InputError, match=words):
        make_recipe(bits, method="rtn")


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 6, 64, -4])
def test_bits_that_nobody_offers_are_refused_with_the_ones_that_exist(bits: int) -> None:
    with pytest.raises(InputError, match=f"^bits {bits}; supported: 4, 8, 16, 32"):
        make_recipe(bits)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_preset_takes_the_common_groups_unchanged(group: int) -> None:
    for model in PRESETS.values():
        configs = make_recipe(4, group_size=group).configs(weight_shapes(model))
        assert configs.pop(TABLE) == INT8
        assert len(configs) == 7 * model.num_hidden_layers
        assert set(configs.values()) == {QuantConfig(4, group)}


def test_a_recipe_says_all_of_itself_as_json() -> None:
    found = json.loads(json.dumps(make_recipe(4).to_json()))
    assert found == {
        "name": "int4-g32",
        "rules": [
            {
                "pattern": r"model\.embed_tokens",
                "config": {"bits": 8, "group_size": 0, "symmetric": True},
                "method": "rtn",
            },
            {"pattern": ".*", "config": {"bits": 4, "group_size": 32, "symmetric": True}, "method": "mse"},
        ],
        "float_bits": 32,
    }


def test_a_pattern_of_a_recipe_cannot_run_for_ever() -> None:
    """Python's `re` goes back through all ways to cut a name into pieces, and this test would not end."""
    rules = [
        {"pattern": pattern, "config": config, "method": "rtn"}
        for pattern, config in ((r"([a-z0-9._]+)+!", None), (r"(\w+\.?)+", {"bits": 8, "group_size": 0}))
    ]
    recipe = Recipe.from_json({"name": "a stranger's", "rules": rules, "float_bits": 32}, "a file")
    assert set(recipe.configs(weight_shapes(GEMMA2_2B)).values()) == {INT8}


def test_rules_that_take_too_long_together_are_refused() -> None:
    rules = [{"pattern": "a" * 999, "config": None, "method": "rtn"}] * 201
    with pytest.raises(
        InputError, match=r"a file is not a recipe \(its patterns have more than 200000 characters together\)"
    ):
        Recipe.from_json({"name": "long", "rules": rules, "float_bits": 32}, "a file")
