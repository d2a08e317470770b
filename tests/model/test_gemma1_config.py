"""Every spelling of a Gemma 1 configuration, read as transformers reads it, and keys of later families read past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import config_refusal, config_values, save_config
from transformers import AutoConfig

from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.model.config import PRESETS, GemmaConfig

# config.json as transformers 4 wrote it for google/gemma-2b; shrunk
VERSION_4: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 24,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 640,
    "model_type": "gemma",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0",
    "use_cache": True,
    "vocab_size": 320,
}
VERSION_5: dict[str, Any] = {
    **{
        key: value for key, value in VERSION_4.items() if key not in ("rope_theta", "rope_scaling", "hidden_activation")
    },
    "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "transformers 4": VERSION_4,
    "transformers 5": VERSION_5,
    "defaults left out": {"model_type": "gemma"},
    "keys of later families": {
        **VERSION_5,
        "sliding_window": 7,
        "query_pre_attn_scalar": 3,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": "x",
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 9.0,
    },
}
# what the family has no key for; sliding_window is used by no layer
FIXED: dict[str, Any] = {"attn_logit_softcapping": None, "final_logit_softcapping": None}


def as_transformers_reads(folder: Path) -> GemmaConfig:
    hf = AutoConfig.from_pretrained(folder)
    for name, value in FIXED.items():
        setattr(hf, name, value)
    hf.layer_types, hf.sliding_window = [GLOBAL] * hf.num_hidden_layers, hf.max_position_embeddings
    hf.query_pre_attn_scalar = hf.head_dim  # modeling_gemma.py: scaling = head_dim**-0.5
    return GemmaConfig(
        **config_values(hf),
        rope_theta=hf.rope_parameters["rope_theta"],
        tie_word_embeddings=hf.tie_word_embeddings,
        architecture="gemma",
    )


@pytest.mark.parametrize("raw", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_config_is_read_as_transformers_reads_it(raw: dict[str, Any], tmp_path: Path) -> None:
    folder = save_config(tmp_path, raw)
    assert GemmaConfig.from_hf(folder) == as_transformers_reads(folder)


def test_layer_types_are_no_key_of_the_family(tmp_path: Path) -> None:
    folder = save_config(tmp_path, {**VERSION_4, "layer_types": [LOCAL] * 3})
    assert GemmaConfig.from_hf(folder).layer_types == (GLOBAL,) * 3


@pytest.mark.parametrize(("name", "parameters"), [("gemma-2b", 2_506_172_416), ("gemma-7b", 8_537_680_896)])
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int, tmp_path: Path) -> None:
    preset = PRESETS[name]
    assert preset.num_parameters == parameters
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    published = {"model_type": "gemma", **{key: getattr(preset, key) for key in sizes}}
    assert GemmaConfig.from_hf(save_config(tmp_path, published)) == preset == as_transformers_reads(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another decoder's class": ({"architectures": ["Gemma2ForCausalLM"]}, "supported: GemmaForCausalLM"),
    "another activation": ({"hidden_act": "silu"}, 'hidden_act is "silu"; supported: "gelu_pytorch_tanh"'),
    "the activation of transformers 4": ({"hidden_activation": "gelu"}, 'hidden_activation is "gelu"; supported:'),
    "a bidirectional encoder": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    "scaled positions": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type is "linear"'),
    "a rope by layer": ({"rope_parameters": {GLOBAL: {}}}, "this model_type has one for all"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_value_that_is_not_computed_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in config_refusal(save_config(tmp_path, {**VERSION_4, **change}))
