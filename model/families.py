"""What each `model_type` of transformers means to the decoder, as data.

Source: HF configuration_gemma.py, configuration_gemma2.py, configuration_gemma3.py, modeling_gemma.py, modeling_gemma3.py.
config.py reads a config.json by these tables. No other file knows one family from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma_edge.bundle.entries import GLOBAL, LOCAL, LayerType


@dataclass(frozen=True)
class BlockNorms:
    """The norms of a block, by their names in the checkpoint."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = "post_attention_layernorm"  # None: the family has no norm there
    before_mlp: str = "pre_feedforward_layernorm"
    after_mlp: str | None = "post_feedforward_layernorm"

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are there."""
        every = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in every if name is not None)


@dataclass(frozen=True)
class Family:
    """One `model_type`: the defaults of its keys, and what is the same in all of its models."""

    architectures: tuple[str, ...]  # classes with this decoder; a classifier has another head. Messages name the first.
    defaults: Mapping[str, Any]  # by field of GemmaConfig: where config.json leaves its key out, or has none for it
    global_every: int  # layer i is global if this divides i + 1, where config.json holds no `layer_types`
    pattern_key: str | None  # the key that may hold another number than `global_every`
    thetas: Mapping[LayerType, float]  # base of the rotary embedding by kind of layer; GLOBAL alone: one for all layers
    rope_types: tuple[str, ...] = ("default",)
    norms: BlockNorms = BlockNorms()
    # equal_to: fields for which the family has no key -> the fields whose values they have
    equal_to: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()  # other keys of config.json that mean nothing in this family; HF reads past them
    # only_value: as ONLY_VALUE in config.py, of this family
    only_value: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_NO_SOFTCAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_SHARED: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": (1,),
    "tie_word_embeddings": True,
}
GEMMA1 = Family(
    architectures=("GemmaForCausalLM", "GemmaModel"),
    defaults={
        **_SHARED,
        **_NO_SOFTCAPS,
        "architecture": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    global_every=1,
    pattern_key=None,
    thetas={GLOBAL: 10_000.0},
    # the branches are not normalised, and the norm before the MLP has the name that later became that of the attention's branch
    norms=BlockNorms(after_attention=None, before_mlp="post_attention_layernorm", after_mlp=None),
    equal_to={"query_pre_attn_scalar": "head_dim", "sliding_window": "max_position_embeddings"},
    absent=("layer_types", *_NO_SOFTCAPS),
)
GEMMA2 = Family(
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    defaults={
        **_SHARED,
        "architecture": "gemma2",
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    global_every=2,
    pattern_key=None,
    thetas={GLOBAL: 10_000.0},
)
GEMMA3 = Family(
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    defaults={
        **_SHARED,
        "architecture": "gemma3_text",
        "qk_norm": True,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        **_NO_SOFTCAPS,
    },
    global_every=6,
    pattern_key="sliding_window_pattern",
    thetas={GLOBAL: 1_000_000.0, LOCAL: 10_000.0},
    rope_types=("default", "linear"),
    only_value={"attn_logit_softcapping": (None,)},  # HF reads the key and never applies it
)
FAMILIES: dict[str, Family] = {"gemma": GEMMA1, "gemma2": GEMMA2, "gemma3_text": GEMMA3}

# Folders that hold an image encoder beside a Gemma 3 decoder, which is described by their `text_config`.
MULTIMODAL: Literal["gemma3"] = "gemma3"
MULTIMODAL_ARCHITECTURES = ("Gemma3ForConditionalGeneration", "Gemma3Model")
TEXT_CONFIG = "text_config"
# OUTER_KEYS: keys that are used from the outer level, where it has them.
OUTER_KEYS = ("eos_token_id", "bos_token_id", "tie_word_embeddings")
IMAGE_PREFIXES = tuple(
    f"{outer}{part}." for outer in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)
# TEXT_PREFIXES: what a decoder's names begin with in these folders, transformers 4 and 5, and in a folder of its own
TEXT_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),  # of Gemma3Model, without a head
)


def text_name(name: str) -> str:
    """The name of a tensor of such a folder in a folder of the decoder alone."""
    prefix, own = next((pair for pair in TEXT_PREFIXES if name.startswith(pair[0])), ("", ""))
    return own + name.removeprefix(prefix)
