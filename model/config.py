"""The configuration of Gemma, Gemma 2 and Gemma 3, with Hugging Face's keys; no torch. Source: HF configuration_gemma.py,
configuration_gemma2.py, configuration_gemma3.py and modeling_rope_utils.py; table 1 of the Gemma 2 report.

Types and ranges are those of a manifest (ModelConfig). What sets one family apart from the others is data: families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from gemma_edge.bundle.checks import config_problems
from gemma_edge.bundle.codec import Key, shown, typed_value
from gemma_edge.bundle.entries import GLOBAL, LOCAL, LayerType, ModelConfig
from gemma_edge.bundle.ranges import Layers, Scale, TokenId
from gemma_edge.errors import InputError
from gemma_edge.model.families import (
    FAMILIES,
    GEMMA1,
    GEMMA2,
    GEMMA3,
    MULTIMODAL,
    MULTIMODAL_ARCHITECTURES,
    OUTER_KEYS,
    TEXT_CONFIG,
    BlockNorms,
    Family,
)
from gemma_edge.reading import present, read_json

T = TypeVar("T")

# ONLY_VALUE: keys of config.json that change the numbers, and the values that this decoder computes. Messages name the first.
ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),  # HF ignores it for Gemma and uses hidden_activation
    "use_bidirectional_attention": (False, None),
}
# TABLES: the matrices with a row per token, by their names without `.weight`
TABLE, HEAD = TABLES = ("model.embed_tokens", "lm_head")
# UNREAD: keys that change nothing here. HF refuses a folder in which they have another type.
UNREAD: dict[str, Any] = {
    "attention_dropout": float | None,
    "initializer_range": float,
    "pad_token_id": int | None,
    "use_cache": bool,
}
# ROPE_FIELDS: the fields of a kind of layer's rotary embedding: its base, and the factor by which positions are divided. The
# bases are also HF's keys of transformers 4.
ROPE_FIELDS: dict[LayerType, tuple[str, str]] = {
    GLOBAL: ("rope_theta", "rope_factor"),
    LOCAL: ("rope_local_base_freq", "rope_local_factor"),
}
# OWN_FIELDS: fields that are not read as config.json has them.
OWN_FIELDS = {"architecture", "qk_norm", *(name for pair in ROPE_FIELDS.values() for name in pair)}
HINT = "correct it, or download the folder again"


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: position p turns plane i of D/2 by p / factor * theta^(-2i / D)."""

    theta: float
    factor: float


@dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """What the checkpoint decides, or its family.

    `from_hf` checks types, ranges, and that the numbers fit together.
    """

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only the sliding window."""
        return self.layer_types[layer] == LOCAL

    def rotary(self, layer: int) -> Rotary:
        """A layer's rotary embedding."""
        if self.is_local(layer) and self.rope_local_base_freq is not None:
            return Rotary(self.rope_local_base_freq, self.rope_local_factor)
        return Rotary(self.rope_theta, self.rope_factor)

    @property
    def hf_class(self) -> str:
        """The class of such a model in transformers."""
        return FAMILIES[self.architecture].architectures[0]

    @property
    def norms(self) -> BlockNorms:
        """The norms of a block."""
        return FAMILIES[self.architecture].norms

    @property
    def head(self) -> str:
        """The matrix that gives the logits: the tied table, or a head of its own."""
        return TABLE if self.tie_word_embeddings else HEAD

    @property
    def num_parameters(self) -> int:
        """Weights of the checkpoint, a tied table counted once."""
        h, d = self.hidden_size, self.head_dim
        attention = 2 * h * d * (self.num_attention_heads + self.num_key_value_heads)
        per_layer = (
            attention + 3 * h * self.intermediate_size + len(self.norms.names) * h + (2 * d if self.qk_norm else 0)
        )
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
        raw, family = text_config(folder)
        _refuse_unsupported(path, raw, family)
        values = dict(family.defaults)
        values |= {field.name: raw[field.name] for field in fields(cls) if field.name in raw.keys() - OWN_FIELDS}
        values["layer_types"] = _layer_types(path, raw, family, values["num_hidden_layers"])
        values |= _ropes(path, raw, family)
        for key in ("bos_token_id", "tie_word_embeddings"):
            if values[key] is None:
                values[key] = family.defaults[key]
        values |= {name: values[other] for name, other in family.equal_to.items()}
        stops, values["eos_token_id"] = _eos(folder, raw, family)
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


def is_multimodal(folder: Path) -> bool:
    """Whether a folder holds an image encoder beside the decoder."""
    return bool(read_json(folder / "config.json").get("model_type") == MULTIMODAL)


def text_config(folder: Path) -> tuple[dict[str, Any], Family]:
    """The keys of a folder's config.json that describe its decoder, as a folder of the decoder alone has them, and its family.

    Raises:
        InputError: no config, or another model_type.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") == MULTIMODAL:
        _check_architectures(path, raw, MULTIMODAL_ARCHITECTURES)
        inner = _object(path, raw, TEXT_CONFIG)
        outer = {key: raw[key] for key in OUTER_KEYS if raw.get(key) is not None}
        named = {"model_type": GEMMA3.defaults["architecture"], "architectures": [GEMMA3.architectures[0]]}
        raw = {**named, **inner, "tie_word_embeddings": True, **outer}
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in FAMILIES:
        supported = ", ".join(map(shown, (*FAMILIES, MULTIMODAL)))
        raise InputError(f"{path}: model_type is {shown(raw.get('model_type'))}; supported: {supported}")
    family = FAMILIES[raw["model_type"]]
    return {key: value for key, value in raw.items() if key not in (*family.equal_to, *family.absent)}, family


def _layer_types(path: Path, raw: Mapping[str, Any], family: Family, num_hidden_layers: Any) -> Any:
    """The kind of each layer: as stored, else by the family's pattern."""
    layers, key = _typed(path, num_hidden_layers, Layers, "num_hidden_layers"), family.pattern_key
    if raw.get("layer_types") is not None:
        return raw["layer_types"]
    if key is None or key not in raw:
        return _pattern(layers, family.global_every)
    return _pattern(layers, _typed(path, raw[key], Layers, key))


def _pattern(layers: int, every: int) -> list[LayerType]:
    """One global layer after `every` - 1 local ones."""
    return [LOCAL if (i + 1) % every else GLOBAL for i in range(layers)]


def _typed(path: Path, value: Any, kind: type[T], *keys: Key) -> T:
    """The value of a key of a file, checked for its type and its range."""
    return typed_value(value, kind, path, HINT, keys)


def _object(path: Path, holder: Mapping[str, Any], key: str, *at: Key) -> dict[str, Any]:
    """The object under a key, empty where it is null or absent; `at` leads to its holder."""
    value = holder.get(key)
    result: dict[str, Any] = _typed(path, {} if value is None else value, dict[str, Any], *at, key)
    return result


def _check_architectures(path: Path, raw: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in _typed(path, raw.get("architectures") or [], list[str], "architectures"):
        if name not in allowed:
            raise InputError(f"{path}: architectures holds {shown(name)}", allowed=allowed)


def _refuse_unsupported(path: Path, raw: Mapping[str, Any], family: Family) -> None:
    _check_architectures(path, raw, family.architectures)
    for key, allowed in {**ONLY_VALUE, **family.only_value}.items():
        if key in raw and raw[key] not in allowed:
            raise InputError(f"{path}: {key} is {shown(raw[key])}; supported: {shown(allowed[0])}")
    for key, kind in UNREAD.items():
        if key in raw:
            _typed(path, raw[key], kind, key)


def _ropes(path: Path, raw: Mapping[str, Any], family: Family) -> dict[str, float]:
    """The fields of the rotary embeddings.

    Their values are in `rope_parameters` (transformers 5), else in `rope_scaling` and at top level (transformers 4).
    """
    objects = _rope_by_layer(path, raw) if LOCAL in family.thetas else _rope_for_all(path, raw)
    values = {}
    for kind, theta in family.thetas.items():
        (at, rope), (theta_field, factor_field) = objects[kind], ROPE_FIELDS[kind]
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in family.rope_types:
            supported = ", ".join(map(shown, family.rope_types))
            raise InputError(f"{path}: rope_type is {shown(rope_type)}; supported: {supported}")
        place = (*at, "rope_theta") if "rope_theta" in rope else (theta_field,)
        values[theta_field] = _typed(path, rope.get("rope_theta", raw.get(theta_field, theta)), Scale, *place)
        if rope_type == "linear":
            if rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise InputError(
                    f"{path}: partial_rotary_factor is {shown(rope['partial_rotary_factor'])}; supported: 1.0"
                )
            values[factor_field] = _typed(path, rope.get("factor"), Scale, *at, "factor")
    return values


# By kind of layer: the keys that lead to an object, and the object.
_Ropes = dict[LayerType, tuple[tuple[str, ...], dict[str, Any]]]


def _rope_for_all(path: Path, raw: Mapping[str, Any]) -> _Ropes:
    """The object of the one rotary embedding."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = _typed(path, raw.get(key) or {}, dict[str, Any], key)
    for name in (GLOBAL, LOCAL):
        if name in rope:
            raise InputError(f"{path}: {key} differs by layer ({name}), but this model_type has one for all; {HINT}")
    return {GLOBAL: ((key,), rope)}


def _rope_by_layer(path: Path, raw: Mapping[str, Any]) -> _Ropes:
    """The object of each kind of layer. `rope_scaling` is a part of the global layers'."""
    key, older = "rope_parameters", "rope_scaling"
    stored, scaling = _object(path, raw, key), _object(path, raw, older)
    others = stored.keys() - {GLOBAL, LOCAL}
    if others:
        raise InputError(f"{path}: {key} holds {shown(min(others))} beside {GLOBAL} and {LOCAL}; {HINT}")
    if scaling and "rope_type" not in scaling:
        raise InputError(
            f"{path}: {older} has no rope_type, and versions of transformers differ in what that means; {HINT}"
        )
    if scaling and raw.get(key) is not None:
        raise InputError(f"{path}: both {key} and {older} describe the global layers; {HINT}")
    ropes: _Ropes = {kind: ((key, kind), _object(path, stored, kind, key)) for kind in ROPE_FIELDS}
    return ropes | ({GLOBAL: ((older,), scaling)} if scaling else {})


def _eos(folder: Path, raw: Mapping[str, Any], family: Family) -> tuple[Path, tuple[int, ...]]:
    """Stop ids, and the file that names them: generation_config.json if it names any, as in HF's `generate`."""
    path, value = folder / "generation_config.json", None
    if present(path):
        value = read_json(path).get("eos_token_id")
    if value is None:
        path, value = folder / "config.json", raw.get("eos_token_id")
    if value is None:
        return path, family.defaults["eos_token_id"]
    if isinstance(value, list):
        return path, _typed(path, value, tuple[TokenId, ...], "eos_token_id")
    return path, (_typed(path, value, TokenId, "eos_token_id"),)


def _preset(
    family: Family, hidden: int, layers: int, ffn: int, heads: tuple[int, int, int], **others: Any
) -> GemmaConfig:
    """A published size; `heads`: number of query heads, number of key and value heads, size of a head."""
    values = {
        **family.defaults,
        **{ROPE_FIELDS[kind][0]: theta for kind, theta in family.thetas.items()},
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "layer_types": tuple(_pattern(layers, family.global_every)),
        **others,
    }
    return GemmaConfig(**values)


_IT2 = {"eos_token_id": (1, 107)}
_IT3 = {"vocab_size": 262_144, "max_position_embeddings": 32_768, "sliding_window": 512, "eos_token_id": (1, 106)}
_IMAGES = {"sliding_window": 1024, "rope_factor": 8.0, "eos_token_id": (1, 106)}  # of the sizes with an image encoder
GEMMA2_2B = _preset(GEMMA2, 2304, 26, 9216, (8, 4, 256), **_IT2)
PRESETS = {
    "gemma-2b": _preset(GEMMA1, 2048, 18, 16384, (8, 1, 256), sliding_window=8192),
    "gemma-7b": _preset(GEMMA1, 3072, 28, 24576, (16, 16, 256), sliding_window=8192),
    "gemma2-2b": GEMMA2_2B,
    "gemma2-9b": _preset(GEMMA2, 3584, 42, 14336, (16, 8, 256), **_IT2),
    "gemma2-27b": _preset(GEMMA2, 4608, 46, 36864, (32, 16, 128), query_pre_attn_scalar=144.0, **_IT2),
    "gemma3-270m": _preset(GEMMA3, 640, 18, 2048, (4, 1, 256), **_IT3),
    "gemma3-1b": _preset(GEMMA3, 1152, 26, 6912, (4, 1, 256), **_IT3),
    "gemma3-4b": _preset(GEMMA3, 2560, 34, 10240, (8, 4, 256), **_IMAGES),
    "gemma3-12b": _preset(GEMMA3, 3840, 48, 15360, (16, 8, 256), **_IMAGES),
    "gemma3-27b": _preset(GEMMA3, 5376, 62, 21504, (32, 16, 128), query_pre_attn_scalar=168.0, **_IMAGES),
}
