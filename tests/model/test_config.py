"""Both spellings of a Gemma 2 configuration, read as transformers reads them; what cannot be computed is refused by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaigns.campaign import time_limit
from huggingface_hub.errors import StrictDataclassError
from support.checkpoints import config_refusal, config_values, save_config
from transformers import AutoConfig
from transformers import Gemma2Config as HFConfig

from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.errors import InputError
from gemma_edge.model.config import GEMMA2_2B, PRESETS, GemmaConfig

# config.json as transformers 4 wrote it for google/gemma-2-2b, shrunk: rope_theta at the top, no layer_types, hidden_act beside
# hidden_activation, a key of its own for the cache.
VERSION_4: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 40.0,
    "bos_token_id": 3,
    "cache_implementation": "hybrid",
    "eos_token_id": 7,
    "final_logit_softcapping": 20.0,
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 640,
    "model_type": "gemma2",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "sliding_window": 40,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 320,
}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


VERSION_5: dict[str, Any] = {
    **without(VERSION_4, "rope_theta", "torch_dtype", "hidden_act", "cache_implementation"),
    "dtype": "float32",
    "layer_types": [GLOBAL, LOCAL, LOCAL],
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_bidirectional_attention": None,
}

SPELLINGS: dict[str, dict[str, Any]] = {
    "transformers 4": VERSION_4,
    "transformers 5": VERSION_5,
    "no softcaps": {**VERSION_4, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "defaults left out": without(
        VERSION_4,
        *("attn_logit_softcapping", "final_logit_softcapping", "rope_theta", "sliding_window", "rms_norm_eps"),
        *("query_pre_attn_scalar", "max_position_embeddings", "bos_token_id", "eos_token_id", "attention_bias"),
    ),
    "rope_scaling null": {**VERSION_4, "rope_scaling": None},
    "rope_scaling default": {**VERSION_4, "rope_scaling": {"rope_type": "default"}},
    "ints for floats": {**VERSION_4, "rope_theta": 5000},
    "layer_types null": {**VERSION_5, "layer_types": None},
    "eos list": {**VERSION_5, "eos_token_id": [1, 107]},
    "eos list of one": {**VERSION_4, "eos_token_id": [9]},
}


def as_transformers_reads(folder: Path) -> GemmaConfig:
    hf = AutoConfig.from_pretrained(folder)
    return GemmaConfig(**config_values(hf), rope_theta=hf.rope_parameters["rope_theta"])


@pytest.mark.parametrize("raw", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_config_is_read_as_transformers_reads_it(raw: dict[str, Any], tmp_path: Path) -> None:
    folder = save_config(tmp_path, raw)
    assert GemmaConfig.from_hf(folder) == as_transformers_reads(folder)


def test_every_key_of_a_checkpoint_arrives(tmp_path: Path) -> None:
    # the values differ from every default, so that a key that is not read shows
    assert GemmaConfig.from_hf(save_config(tmp_path, VERSION_5)) == GemmaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=(GLOBAL, LOCAL, LOCAL),
        query_pre_attn_scalar=24,
        sliding_window=40,
        max_position_embeddings=640,
        attn_logit_softcapping=40.0,
        final_logit_softcapping=20.0,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        bos_token_id=3,
        eos_token_id=(7,),
    )


def test_layers_alternate_from_a_local_one_when_the_checkpoint_does_not_say(tmp_path: Path) -> None:
    config = GemmaConfig.from_hf(save_config(tmp_path, VERSION_4))
    assert [config.is_local(i) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [1, 107]}, (1, 107)), ({"eos_token_id": 5}, (5,)), ({"do_sample": True}, (7,)), (None, (7,))],
)
def test_generation_config_decides_the_stop_ids_when_it_names_them(
    generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert GemmaConfig.from_hf(save_config(tmp_path, VERSION_4, generation)).eos_token_id == expected


def test_json_round_trip_keeps_the_config() -> None:
    for preset in PRESETS.values():
        assert GemmaConfig.from_json(json.loads(json.dumps(preset.to_json()))) == preset


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gemma2-2b", 2_614_341_888), ("gemma2-9b", 9_241_705_984), ("gemma2-27b", 27_227_128_320)],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert PRESETS[name].num_parameters == parameters


def test_2b_preset_is_the_default_of_transformers(tmp_path: Path) -> None:
    HFConfig(eos_token_id=[1, 107]).save_pretrained(tmp_path)
    assert GemmaConfig.from_hf(tmp_path) == GEMMA2_2B


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"model_type": "gemma3n_text"},
        'model_type is "gemma3n_text"; supported: "gemma", "gemma2"',
    ),
    "no architecture": ({"model_type": None}, "model_type is null"),
    "rope scaling of transformers 4": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type is "linear"'),
    "rope scaling of transformers 5": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        'rope_type is "yarn"; supported: "default"',
    ),
    "rope by layer": ({"rope_parameters": {GLOBAL: {"rope_type": "default", "rope_theta": 1e4}}}, "differs by layer"),
    "a classifier": (
        {"architectures": ["Gemma2ForSequenceClassification"]},
        'architectures holds "Gemma2ForSequenceClassification"; supported: Gemma2ForCausalLM',
    ),
    "attention bias": ({"attention_bias": True}, "attention_bias is true; supported: false"),
    "other activation": ({"hidden_activation": "silu"}, 'hidden_activation is "silu"'),
    "bidirectional": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_value_that_is_not_computed_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in config_refusal(save_config(tmp_path, {**VERSION_4, **change}))


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown layer type": ({"layer_types": [LOCAL, "chunked_attention", GLOBAL]}, r"layer_types\[1\] is .chunked_att"),
    "layer types of another depth": ({"layer_types": [LOCAL, GLOBAL]}, "layer_types is a list; it must be a list of 3"),
    "heads that cannot share": ({"num_key_value_heads": 3}, "it must be a divisor of num_attention_heads, 4"),
    "heads that do not divide": ({"num_attention_heads": 6}, "hidden_size is 64; it must be a multiple of num_att"),
    "odd head": ({"head_dim": 15}, "head_dim is 15; it must be even"),
    "no window": ({"sliding_window": 0}, "sliding_window is 0"),
    "negative scalar": ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
    "a start outside of the table": ({"bos_token_id": 320}, "bos_token_id is 320; it must be below vocab_size, 320"),
    "a stop outside of the table": ({"eos_token_id": [1, 320]}, r"eos_token_id\[1\] is 320; it must be below"),
}


@pytest.mark.parametrize(("change", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_numbers_that_do_not_fit_together_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        GemmaConfig.from_hf(save_config(tmp_path, {**VERSION_4, **change}))


@pytest.mark.parametrize("key", [key for key in VERSION_4 if key in GemmaConfig.__dataclass_fields__])
def test_a_key_that_is_left_out_has_the_default_of_transformers(key: str, tmp_path: Path) -> None:
    """head_dim and six other sizes were required, although transformers has defaults for them."""
    raw = {"vocab_size": 320, "hidden_size": 64, **without(VERSION_4, key)} if "size" not in key else VERSION_4
    folder = save_config(tmp_path, without(raw, key))
    assert GemmaConfig.from_hf(folder) == as_transformers_reads(folder)


# Values that were accepted and broke the export later, or silently changed the model.
WRONG_VALUES: dict[str, list[Any]] = {
    "vocab_size": [320.0, True, "320", None, 0, -1, 1 << 70],
    "hidden_size": ["big", None, 0, 1 << 40],
    "num_hidden_layers": [True, 2.5, 10**18],
    "num_key_value_heads": [0],
    "head_dim": [None, 16.0],
    "query_pre_attn_scalar": [math.inf, math.nan, True, "24", None, 0, 1e-320, 1e21, [24]],
    "sliding_window": [48.5, True, None, "8", 0, 1e21],
    "max_position_embeddings": [None, 0.5, -8],
    "rms_norm_eps": [math.inf, -1e-6, 0, None, True, "1e-6"],
    "attn_logit_softcapping": [0, -30.0, math.inf, 1e-320, True, "50"],
    "final_logit_softcapping": [0, -30.0, math.nan, 1e21, [30.0]],
    "rope_theta": ["x", True, None, 0, -1, math.inf, 1e21],
    "rope_parameters": [[1], "default", {"rope_type": "default", "rope_theta": None}, {"rope_theta": {}}],
    "layer_types": [4, [], "full_attention", {}, [1, 2, 3]],
    "bos_token_id": [[], "", [2], 2.0, True, -1, "<bos>"],
    "eos_token_id": [[], "", "<eos>", 1.0, [1.5], True, [True], [[1]], -1, {}],
    "pad_token_id": ["", [0]],
    "use_cache": ["yes"],
    "initializer_range": [None, "x"],
}
CASES = [(key, value) for key, values in WRONG_VALUES.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES, ids=[f"{key}: {value!r}"[:60] for key, value in CASES])
def test_a_value_that_no_model_can_have_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    assert f"{key}" in config_refusal(save_config(tmp_path, {**VERSION_4, key: value}))


@pytest.mark.parametrize("value", WRONG_VALUES["eos_token_id"], ids=repr)
def test_stop_ids_of_generation_config_are_checked_like_those_of_the_config(value: Any, tmp_path: Path) -> None:
    assert "generation_config.json: eos_token_id" in config_refusal(
        save_config(tmp_path, VERSION_4, {"eos_token_id": value})
    )


# EXTRA: keys that do not change the model's numbers. ACCEPTED: transformers 4 takes them too, with the same result.
EXTRA = ("architectures", "torch_dtype", "transformers_version", "model_type", "hidden_act", "cache_implementation")
ACCEPTED = [
    ("attention_bias", None),
    ("hidden_activation", None),
    ("initializer_range", -3),
    ("query_pre_attn_scalar", 2.5),
]


@pytest.mark.parametrize("key", [key for key in VERSION_4 if key not in EXTRA])
def test_what_transformers_refuses_is_refused(key: str, tmp_path: Path) -> None:
    """Every key of a configuration with values of every type, where transformers' own class does not take them."""
    values: list[Any] = [None, True, 2.5, -3, "x", [], [None], {}]
    for value in values:
        folder = save_config(tmp_path, {**VERSION_4, key: value})
        try:
            HFConfig.from_pretrained(folder)
        except (StrictDataclassError, ValueError, TypeError):
            if (key, value) in ACCEPTED:
                GemmaConfig.from_hf(folder)
            else:
                config_refusal(folder)


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_lies_in_a_files_place_is_not_taken_for_an_absent_file(
    put: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """A generation_config.json that was a dangling link silently changed the stop ids."""
    save_config(tmp_path, VERSION_4, {"eos_token_id": 9})
    (tmp_path / name).unlink()
    put(tmp_path / name)
    with time_limit(10):
        assert str(tmp_path / name) in config_refusal(tmp_path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    assert "has no config.json" in config_refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"gemma2"', "\x00\x01"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json_is_named(name: str, text: str, tmp_path: Path) -> None:
    save_config(tmp_path, VERSION_4)
    (tmp_path / name).write_text(text)
    assert str(tmp_path / name) in config_refusal(tmp_path)


def test_rope_theta_beside_rope_parameters_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = save_config(tmp_path, {**VERSION_4, "rope_parameters": {"rope_type": "default"}})
    assert as_transformers_reads(folder).rope_theta == 5000.0
    assert GemmaConfig.from_hf(folder).rope_theta == 5000.0


def test_rope_scaling_under_its_older_key_is_refused(tmp_path: Path) -> None:
    rope = {"type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert "linear" in config_refusal(
        save_config(tmp_path, {**without(VERSION_4, "rope_theta"), "rope_parameters": rope})
    )


def test_a_null_eos_is_refused_or_replaced(tmp_path: Path) -> None:
    folder = save_config(tmp_path, {**VERSION_4, "eos_token_id": None}, {"eos_token_id": None})
    try:
        assert GemmaConfig.from_hf(folder).eos_token_id == (1,)
    except InputError as error:
        assert "eos_token_id" in str(error)
