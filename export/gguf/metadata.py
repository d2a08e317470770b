"""What a GGUF file says of a model: the configuration under llama.cpp's keys. The inverse of model/gguf/config.py."""

from __future__ import annotations

from typing import Any

from gemma_edge.bundle.entries import LOCAL
from gemma_edge.errors import InputError
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.families import FAMILIES
from gemma_edge.model.gguf.config import ARCHITECTURES, KEYS, scale_of_attention

# HEADS: architectures whose head may be a matrix of its own; PATTERNS: those that may have local layers; SCALED: those whose
# global layers may scale positions. Source: llama.cpp's src/models.
HEADS = SCALED = ("gemma3",)
PATTERNS = ("gemma2", "gemma3")


def architecture_of(config: GemmaConfig) -> str:
    """llama.cpp's name of a model's architecture."""
    return next(name for name, kind in ARCHITECTURES.items() if kind.family is FAMILIES[config.architecture])


def model_metadata(config: GemmaConfig) -> dict[str, Any]:
    """The pairs that describe the model.

    Raises:
        InputError: llama.cpp would compute something else.
    """
    name = architecture_of(config)
    _refuse_others(config, name)
    values = {key: getattr(config, ours) for key, ours in KEYS.items()}
    if name not in PATTERNS:
        del values["attention.sliding_window"]
    else:
        values["attention.sliding_window_pattern"] = [int(kind == LOCAL) for kind in config.layer_types]
    values["attention.value_length"] = config.head_dim
    values["rope.freq_base"] = config.rope_theta
    if LOCAL in config.layer_types:
        values["rope.freq_base_swa"] = config.rotary(config.layer_types.index(LOCAL)).theta
    if config.rope_factor != 1:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_factor}
    return {f"{name}.{key}": value for key, value in values.items() if value is not None}


def _refuse_others(config: GemmaConfig, name: str) -> None:
    scale = scale_of_attention(ARCHITECTURES[name], config.to_json())
    local = LOCAL in config.layer_types
    faults = {
        f"queries scaled by {config.query_pre_attn_scalar:g} ** -0.5, where llama.cpp takes {scale:g}": (
            config.query_pre_attn_scalar != scale
        ),
        "a head of its own": not config.tie_word_embeddings and name not in HEADS,
        "local layers": local and name not in PATTERNS,
        "scaled positions": config.rope_factor != 1 and name not in SCALED,
        "scaled positions in local layers": config.rope_local_factor != 1 and local,
    }
    for fault, found in faults.items():
        if found:
            raise InputError(f"llama.cpp cannot run this {name}, which has {fault}")
