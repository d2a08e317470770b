"""Every spelling of a Gemma 3 configuration, read as transformers reads it; what it would read differently is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from support.checkpoints import config_refusal, config_values, save_config
from transformers import AutoConfig, Gemma3TextConfig

from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.model.config import PRESETS, GemmaConfig, Rotary

# config.json as transformers 4 wrote it for google/gemma-3-1b-it and, with scaled positions, for larger ones; shrunk.
VERSION_4: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 3,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 640,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-05,
    "rope_local_base_freq": 300,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 5000,
    "sliding_window": 40,
    "sliding_window_pattern": 3,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 320,
}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


ROPES: dict[str, Any] = {
    GLOBAL: {"factor": 8.0, "rope_theta": 5000.0, "rope_type": "linear"},
    LOCAL: {"rope_theta": 300.0, "rope_type": "default"},
}
VERSION_5: dict[str, Any] = {
    **without(VERSION_4, "rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern", "torch_dtype"),
    "_sliding_window_pattern": 6,
    "dtype": "bfloat16",
    "layer_types": [GLOBAL, LOCAL, LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL],
    "rope_parameters": ROPES,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "transformers 4": VERSION_4,
    "transformers 5": VERSION_5,
    "no pattern": without(VERSION_4, "sliding_window_pattern"),
    "all global": {**VERSION_4, "sliding_window_pattern": 1},
    "pattern beside layer_types": {**VERSION_5, "sliding_window_pattern": 2},
    "no scaling": {**VERSION_4, "rope_scaling": None},
    "no ropes": without(VERSION_4, "rope_scaling", "rope_theta", "rope_local_base_freq"),
    "ropes of one kind": {**VERSION_5, "rope_parameters": {GLOBAL: ROPES[GLOBAL]}},
    "ropes without bases": {**VERSION_5, "rope_parameters": {LOCAL: {"rope_type": "default"}, GLOBAL: None}},
    "ropes of 5 and bases of 4": {
        **VERSION_4,
        "rope_scaling": None,
        "rope_parameters": {GLOBAL: {"rope_type": "default"}},
    },
    "local positions scaled": {**VERSION_5, "rope_parameters": {**ROPES, LOCAL: {**ROPES[GLOBAL], "factor": 2}}},
    "older key of a kind": {**VERSION_5, "rope_parameters": {**ROPES, GLOBAL: {"type": "linear", "factor": 3.0}}},
    "a final softcap": {**VERSION_4, "final_logit_softcapping": 20.0},
    "defaults left out": {key: VERSION_4[key] for key in ("model_type", "architectures")},
}


def as_transformers_reads(folder: Path) -> GemmaConfig:
    hf = AutoConfig.from_pretrained(folder)
    ropes = {kind: hf.rope_parameters[kind] for kind in (GLOBAL, LOCAL)}
    factors = {kind: float(rope["factor"]) if rope["rope_type"] == "linear" else 1.0 for kind, rope in ropes.items()}
    return GemmaConfig(
        **config_values(hf),
        rope_theta=ropes[GLOBAL]["rope_theta"],
        rope_factor=factors[GLOBAL],
        rope_local_base_freq=ropes[LOCAL]["rope_theta"],
        rope_local_factor=factors[LOCAL],
        tie_word_embeddings=hf.tie_word_embeddings,
        architecture="gemma3_text",
        qk_norm=True,
    )


@pytest.mark.parametrize("raw", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_config_is_read_as_transformers_reads_it(raw: dict[str, Any], tmp_path: Path) -> None:
    folder = save_config(tmp_path, raw)
    assert GemmaConfig.from_hf(folder) == as_transformers_reads(folder)


@pytest.mark.parametrize("raw", [VERSION_4, VERSION_5], ids=["transformers 4", "transformers 5"])
def test_each_kind_of_layer_has_its_own_rope(raw: dict[str, Any], tmp_path: Path) -> None:
    config = GemmaConfig.from_hf(save_config(tmp_path, raw))
    first = config.layer_types.index(GLOBAL)
    assert config.rotary(first) == Rotary(5000.0, 8.0)
    assert config.rotary(first + 1) == Rotary(300.0, 1.0)


@pytest.mark.parametrize("key", [key for key in VERSION_4 if key in GemmaConfig.__dataclass_fields__])
def test_a_key_that_is_left_out_has_the_default_of_transformers(key: str, tmp_path: Path) -> None:
    folder = save_config(tmp_path, without(VERSION_4, key))
    if key in ("hidden_size", "vocab_size"):
        folder = save_config(tmp_path, {**without(VERSION_4, key), "num_attention_heads": 8})
    assert GemmaConfig.from_hf(folder) == as_transformers_reads(folder)


def test_json_round_trip_keeps_the_config(tmp_path: Path) -> None:
    config = GemmaConfig.from_hf(save_config(tmp_path, VERSION_4))
    assert GemmaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gemma3-270m", 268_098_176),
        ("gemma3-1b", 999_885_952),
        ("gemma3-4b", 3_880_263_168),
        ("gemma3-12b", 11_766_034_176),
        ("gemma3-27b", 27_009_346_304),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """Of the decoder alone: the sizes from 4B on have an image encoder beside it."""
    assert PRESETS[name].num_parameters == parameters


def test_a_preset_is_what_transformers_makes_of_the_published_file(tmp_path: Path) -> None:
    published = {  # google/gemma-3-4b-it, its text_config with the stop ids of the outer level
        "eos_token_id": [1, 106],
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    assert (
        GemmaConfig.from_hf(save_config(tmp_path, published)) == PRESETS["gemma3-4b"] == as_transformers_reads(tmp_path)
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another decoder's class": ({"architectures": ["Gemma2ForCausalLM"]}, "supported: Gemma3ForCausalLM"),
    "a softcap that transformers ignores": (
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0; supported: null",
    ),
    "a bidirectional encoder": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    "other scaling": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        'rope_type is "yarn"; supported: "default", "linear"',
    ),
    "scaling under its older key": (
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        "rope_scaling has no rope_type",
    ),
    "scaling without a factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor is null"),
    "scaling by nothing": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor is 0"),
    "part of a head": (
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5; supported: 1.0",
    ),
    "one rope for all": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 'holds "rope_theta" beside'),
    "two spellings": ({"rope_parameters": ROPES}, "both rope_parameters and rope_scaling"),
    "a pattern of nothing": ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "no local base": ({"rope_local_base_freq": None}, "rope_local_base_freq is null"),
    "keys that only we write": ({"qk_norm": False, "rope_factor": "x", "rope_theta": "y"}, "rope_theta"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_value_that_is_not_computed_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in config_refusal(save_config(tmp_path, {**VERSION_4, **change}))


def test_keys_that_are_no_keys_of_transformers_change_nothing(tmp_path: Path) -> None:
    own = {"qk_norm": False, "rope_factor": 3.0, "rope_local_factor": 3.0, "architecture": "gemma2"}
    assert GemmaConfig.from_hf(save_config(tmp_path, {**VERSION_4, **own})) == as_transformers_reads(tmp_path)


# EXTRA: keys that do not change the model's numbers. ACCEPTED: transformers 4 takes them too, with the same result.
EXTRA = ("architectures", "torch_dtype", "transformers_version", "model_type", "cache_implementation")
ACCEPTED = [
    ("attention_bias", None),
    ("attention_bias", 0),
    ("initializer_range", 0),
    ("hidden_activation", None),
    ("initializer_range", -3),
    ("query_pre_attn_scalar", 2.5),
]


@pytest.mark.parametrize("key", [key for key in VERSION_4 if key not in EXTRA] + ["layer_types", "rope_parameters"])
def test_what_transformers_refuses_is_refused(key: str, tmp_path: Path) -> None:
    """Every key of a configuration with values of every type, where transformers' own class does not take them."""
    values: list[Any] = [None, True, 2.5, -3, 0, "x", [], [None], {}, {GLOBAL: {}}, {GLOBAL: 3}, {LOCAL: False}]
    for value in values:
        folder = save_config(tmp_path, {**VERSION_4, key: value})
        try:
            Gemma3TextConfig.from_pretrained(folder)
        except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError):
            if (key, value) in ACCEPTED:
                GemmaConfig.from_hf(folder)
            else:
                config_refusal(folder)
