"""Gemma 2's configuration, with Hugging Face's keys; no torch. Source: HF configuration_gemma2.py; Gemma 2 report, table 1.

Types and ranges are those of a manifest (ModelConfig); the defaults are those of HF's Gemma2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from gemma_edge.bundle.checks import config_problems
from gemma_edge.bundle.codec import shown, typed_value
from gemma_edge.bundle.entries import GLOBAL, LOCAL, LayerType, ModelConfig
from gemma_edge.bundle.ranges import HeadDim, Heads, Layers, Scale, TokenId, Tokens, Width
from gemma_edge.errors import InputError
from gemma_edge.reading import present, read_json

T = TypeVar("T")

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2Model")  # a classifier has another head
# ONLY_VALUE: keys of config.json that change the numbers, and the values that this decoder computes. Messages name the first.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),  # HF ignores it for Gemma 2 and uses hidden_activation
    "use_bidirectional_attention": (False, None),
}
TABLE, HEAD = TABLES = (
    "model.embed_tokens",
    "lm_head",
)  # the matrices with a row per token, by their names without `.weight`
# UNREAD: keys that change nothing here. HF refuses a folder in which they have another type.
UNREAD: dict[str, Any] = {
    "attention_dropout": float | None,
    "initializer_range": float,
    "pad_token_id": int | None,
    "use_cache": bool,
}
HINT = "correct it, or download the folder again"


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """What the checkpoint decides, and HF's default for every key that a config.json may leave out.

    `from_hf` checks types, ranges, and that the numbers fit together.
    """

    vocab_size: Tokens = 256000
    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads = 4
    head_dim: HeadDim = 256
    query_pre_attn_scalar: Scale = 256.0  # attention scores are scaled by its -1/2 power, not by head_dim's
    sliding_window: Tokens = 4096  # number of keys that a query of a local layer sees, its own included
    max_position_embeddings: Tokens = 8192
    attn_logit_softcapping: Scale | None = 50.0
    final_logit_softcapping: Scale | None = 30.0
    rms_norm_eps: Scale = 1e-6
    rope_theta: Scale = 10000.0
    bos_token_id: TokenId = 2
    eos_token_id: tuple[TokenId, ...] = (1,)

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
    def from_json(cls, data: Mapping[str, Any]) -> GemmaConfig:
        """Inverse of `to_json`."""
        tuples = {key: tuple(data[key]) for key in ("layer_types", "eos_token_id")}
        return cls(**{**data, **tuples})

    @classmethod
    def from_hf(cls, folder: Path) -> GemmaConfig:
        """Read `config.json` (transformers 4 or 5 spelling) and the stop ids of `generation_config.json`.

        Raises:
            InputError: no config, another architecture, or a key whose value this decoder does not compute.
        """
        path = folder / "config.json"
        raw = read_json(path)
        _refuse_unsupported(path, raw)
        values = {field.name: raw[field.name] for field in fields(cls) if field.name in raw}
        layers = _typed(path, raw.get("num_hidden_layers", cls.num_hidden_layers), Layers, "num_hidden_layers")
        values["layer_types"] = _alternating(layers) if raw.get("layer_types") is None else raw["layer_types"]
        values["rope_theta"] = _rope_theta(path, raw)
        for key in ("bos_token_id", "tie_word_embeddings"):
            if values.get(key) is None:
                values[key] = getattr(cls, key)
        stops, values["eos_token_id"] = _eos(folder, raw)
        config = _typed(path, values, cls)
        for problem in config_problems(config, ()):
            raise problem.error(stops if problem.keys[0] == "eos_token_id" else path, HINT)
        return config

    def resized(self, vocab_size: int, origin: Path) -> GemmaConfig:
        """The same model with another number of tokens.

        Args:
            vocab_size: the number.
            origin: what decides it, for the message.

        Raises:
            InputError: the model's BOS id or one of its stop ids is not below it.
        """
        config = replace(self, vocab_size=vocab_size)
        for problem in config_problems(config, ()):
            raise problem.error(origin, HINT)
        return config


def _alternating(layers: int) -> list[LayerType]:
    return [LOCAL if i % 2 == 0 else GLOBAL for i in range(layers)]


def _typed(path: Path, value: Any, kind: type[T], *keys: str) -> T:
    """The value of a key of a file, checked for its type and its range."""
    return typed_value(value, kind, path, HINT, keys)


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") != "gemma2":
        raise InputError(f'{path}: model_type is {shown(raw.get("model_type"))}; supported: "gemma2"')
    architectures = _typed(path, raw.get("architectures") or [ARCHITECTURES[0]], list[str], "architectures")
    for name in architectures:
        if name not in ARCHITECTURES:
            raise InputError(f"{path}: architectures holds {shown(name)}", allowed=ARCHITECTURES)
    for key, allowed in ONLY_VALUE.items():
        if key in raw and raw[key] not in allowed:
            raise InputError(f"{path}: {key} is {shown(raw[key])}; supported: {shown(allowed[0])}")
    for key, kind in UNREAD.items():
        if key in raw:
            _typed(path, raw[key], kind, key)


def _rope_theta(path: Path, raw: Mapping[str, Any]) -> float:
    """Its value in `rope_parameters` (transformers 5) or `rope_scaling`, else at top level (transformers 4)."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = _typed(path, raw.get(key) or {}, dict[str, Any], key)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f'{path}: rope_type is {shown(kind)}; supported: "default"')
    for name in (GLOBAL, LOCAL):
        if name in rope:
            raise InputError(f"{path}: {key} differs by layer ({name}), but Gemma 2 has one for all; {HINT}")
    at = (key, "rope_theta") if "rope_theta" in rope else ("rope_theta",)
    value = rope.get("rope_theta", raw.get("rope_theta", GemmaConfig.rope_theta))
    return _typed(path, value, Scale, *at)


def _eos(folder: Path, raw: Mapping[str, Any]) -> tuple[Path, tuple[int, ...]]:
    """Stop ids, and the file that names them: generation_config.json if it names any, as in HF's `generate`."""
    path, value = folder / "generation_config.json", None
    if present(path):
        value = read_json(path).get("eos_token_id")
    if value is None:
        path, value = folder / "config.json", raw.get("eos_token_id")
    if value is None:
        return path, GemmaConfig.eos_token_id
    if isinstance(value, list):
        return path, _typed(path, value, tuple[TokenId, ...], "eos_token_id")
    return path, (_typed(path, value, TokenId, "eos_token_id"),)


def _preset(hidden: int, layers: int, ffn: int, heads: tuple[int, int, int], scalar: int) -> GemmaConfig:
    """A published size; `heads`: number of query heads, number of key and value heads, size of a head."""
    return GemmaConfig(
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
