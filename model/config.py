"""Gemma 2's configuration, with Hugging Face's keys; no torch. Source: HF configuration_gemma2.py; Gemma 2 report, table 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.errors import InputError

# ONLY_VALUE: keys of config.json that change the numbers, and the values that this decoder computes. Messages name the first.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),  # HF ignores it for Gemma 2 and uses hidden_activation
    "tie_word_embeddings": (True, False, None),
    "use_bidirectional_attention": (False, None),
    "rope_scaling": (None,),
}
NUMBERS = (
    "query_pre_attn_scalar",
    "sliding_window",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
TABLE, HEAD = "model.embed_tokens", "lm_head"  # the matrices with a row per token, by their names without `.weight`
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class Gemma2Config:
    """What the checkpoint decides. Only fields with a default in HF's Gemma2Config have one, the same."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]  # LOCAL or GLOBAL per layer
    query_pre_attn_scalar: float = 256.0  # attention scores are scaled by its -1/2 power, not by head_dim's
    sliding_window: int = 4096  # number of keys that a query of a local layer sees, its own included
    max_position_embeddings: int = 8192
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    tie_word_embeddings: bool = True  # False: the head is a matrix of its own; see `checkpoint.with_stored_head`

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        unknown = set(self.layer_types) - {LOCAL, GLOBAL}
        if unknown:
            raise InputError(f"layer_types holds {sorted(unknown)}; supported: {LOCAL}, {GLOBAL}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        for key in ("sliding_window", "max_position_embeddings", "query_pre_attn_scalar", "vocab_size"):
            if getattr(self, key) <= 0:
                raise InputError(f"{key} is {getattr(self, key)}; it must be positive")

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only the sliding window."""
        return self.layer_types[layer] == LOCAL

    @property
    def head(self) -> str:
        """The matrix that gives the logits: the tied table, or a head of its own."""
        return TABLE if self.tie_word_embeddings else HEAD

    @property
    def num_parameters(self) -> int:
        """Weights of the checkpoint, a tied table counted once."""
        h, d = self.hidden_size, self.head_dim
        attention = 2 * h * d * (self.num_attention_heads + self.num_key_value_heads)
        per_layer = attention + 3 * h * self.intermediate_size + 4 * h
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * h + self.num_hidden_layers * per_layer + h

    def to_json(self) -> dict[str, Any]:
        """Plain values under HF's keys."""
        return {**asdict(self), "layer_types": list(self.layer_types), "eos_token_id": list(self.eos_token_id)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gemma2Config:
        """Inverse of `to_json`."""
        tuples = {key: tuple(data[key]) for key in ("layer_types", "eos_token_id")}
        return cls(**{**data, **tuples})

    @classmethod
    def from_hf(cls, folder: Path) -> Gemma2Config:
        """Read `config.json` (transformers 4 or 5 spelling) and the stop ids of `generation_config.json`.

        Raises:
            InputError: no config, another architecture, or a key whose value this decoder does not compute.
        """
        path = folder / "config.json"
        raw = read_json(path)
        _refuse_unsupported(path, raw)
        keys = (
            "query_pre_attn_scalar",
            "sliding_window",
            "max_position_embeddings",
            "rms_norm_eps",
            "bos_token_id",
            "tie_word_embeddings",
        )
        layers = raw["num_hidden_layers"]
        return cls(
            **{key: raw[key] for key in REQUIRED},
            **{key: raw[key] for key in keys if raw.get(key) is not None},
            # null switches a softcap off; an absent key means HF's default
            **{key: raw[key] for key in ("attn_logit_softcapping", "final_logit_softcapping") if key in raw},
            layer_types=tuple(raw.get("layer_types") or _alternating(layers)),
            rope_theta=_rope_theta(path, raw),
            eos_token_id=_eos(folder, raw),
        )


def _alternating(layers: int) -> list[str]:
    return [LOCAL if i % 2 == 0 else GLOBAL for i in range(layers)]


def read_json(path: Path, hint: str = "pass a Hugging Face model folder") -> dict[str, Any]:
    """The object in a JSON file of a folder that the user gave.

    Args:
        path: the file.
        hint: what the error says to do when there is no such file.

    Raises:
        InputError: no such file, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}", hint=hint) from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return data


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") != "gemma2":
        raise InputError(f"{path}: model_type is {raw.get('model_type')!r}; supported: 'gemma2'")
    for key, allowed in ONLY_VALUE.items():
        if key in raw and raw[key] not in allowed:
            raise InputError(f"{path}: {key} is {raw[key]!r}; supported: {allowed[0]!r}")
    for key in REQUIRED:
        if raw.get(key) is None:
            raise InputError(f"{path}: {key} is missing")
        if not isinstance(raw[key], int) or raw[key] < 1:
            raise InputError(f"{path}: {key} is {raw[key]!r}; it must be a whole number above zero")
    for key in NUMBERS:
        if not isinstance(raw.get(key), int | float | None):
            raise InputError(f"{path}: {key} is {raw[key]!r}; it must be a number")
    if not isinstance(raw.get("layer_types"), list | None):
        raise InputError(f"{path}: layer_types is {raw['layer_types']!r}; it must be a list, one entry per layer")


def _rope_theta(path: Path, raw: Mapping[str, Any]) -> float:
    """Its value in `rope_parameters` (transformers 5), else at top level (transformers 4)."""
    parameters = raw.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise InputError(f"{path}: rope_type is {kind!r}; supported: 'default'")
    return float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)


def _eos(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Stop ids: those of generation_config.json if there are any, as in HF's `generate`."""
    generation = folder / "generation_config.json"
    preferred = read_json(generation).get("eos_token_id") if generation.is_file() else None
    value = next((v for v in (preferred, raw.get("eos_token_id")) if v is not None), 1)
    return tuple(value) if isinstance(value, list) else (int(value),)


def _preset(hidden: int, layers: int, ffn: int, heads: tuple[int, int, int], scalar: int) -> Gemma2Config:
    """A published size; `heads`: number of query heads, number of key and value heads, size of a head."""
    return Gemma2Config(
        vocab_size=256000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        layer_types=tuple(_alternating(layers)),
        query_pre_attn_scalar=scalar,
        eos_token_id=(1, 107),
    )


GEMMA2_2B = _preset(2304, 26, 9216, (8, 4, 256), 256)
GEMMA2_9B = _preset(3584, 42, 14336, (16, 8, 256), 256)
GEMMA2_27B = _preset(4608, 46, 36864, (32, 16, 128), 144)
PRESETS = {"gemma2-2b": GEMMA2_2B, "gemma2-9b": GEMMA2_9B, "gemma2-27b": GEMMA2_27B}
