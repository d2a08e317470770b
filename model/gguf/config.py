"""A GGUF file's metadata as the config.json of a Hugging Face folder; no torch.

Source: llama.cpp's llama-model.cpp, which fixes by architecture what the metadata leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_edge.bundle.codec import shown
from gemma_edge.bundle.entries import GLOBAL, LOCAL
from gemma_edge.errors import InputError
from gemma_edge.model.families import GEMMA1, GEMMA2, GEMMA3, Family
from gemma_edge.model.gguf.reader import HINT, Header

# KEYS: the metadata's keys below the architecture -> those of config.json. A file without them is refused, softcaps excepted.
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
IMAGES = "clip"  # the architecture of an image encoder, which llama.cpp keeps in a file of its own (mmproj)
TABLE, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp knows of an architecture beside the metadata."""

    family: Family
    # layers_of_27b: the size whose attention is scaled by hidden_size / heads; in the others it is head_dim
    layers_of_27b: int | None = None


ARCHITECTURES = {
    "gemma": Architecture(GEMMA1),
    "gemma2": Architecture(GEMMA2, 46),
    "gemma3": Architecture(GEMMA3, 62),
}


def config_json(path: Path, header: Header, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The keys of config.json. Their types and ranges are checked by who reads it.

    Args:
        path: the file, for messages.
        header: its metadata.
        tensors: shapes of the model's tensors by llama.cpp's names, those of the other parts of a split file included.

    Raises:
        InputError: another architecture, or a key or the table is missing.
    """
    metadata = header.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        supported = ", ".join(map(shown, ARCHITECTURES))
        way = "; it is an image encoder: pass the file of its decoder" if name == IMAGES else ""
        raise InputError(f"{path}: general.architecture is {shown(name)}; supported: {supported}{way}")
    kind = ARCHITECTURES[name]
    for key, ours in KEYS.items():
        if f"{name}.{key}" not in metadata and ours not in (*SOFTCAPS, *kind.family.equal_to):
            raise InputError(f"{path} has no {name}.{key}", hint=HINT)
    if len(tensors.get(TABLE, ())) != 2:
        raise InputError(f"{path} has no table {TABLE}", hint=HINT)
    values = {ours: metadata[f"{name}.{key}"] for key, ours in KEYS.items() if f"{name}.{key}" in metadata}
    values |= {cap: None for cap in SOFTCAPS if values.get(cap) == 0}
    values["rms_norm_eps"] = _shortest(values["rms_norm_eps"])
    return {
        "architectures": [kind.family.architectures[0]],
        "model_type": kind.family.defaults["architecture"],
        "vocab_size": tensors[TABLE][0],
        "tie_word_embeddings": HEAD not in tensors,
        "query_pre_attn_scalar": scale_of_attention(kind, values),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _stops(metadata),
        **values,
        **_layer_types(path, metadata, name),
        **_ropes(metadata, name, kind.family),
    }


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-06, where the file holds 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def scale_of_attention(kind: Architecture, values: Mapping[str, Any]) -> Any:
    """The square of what queries are divided by, which no file stores.

    Args:
        kind: the architecture.
        values: of config.json.
    """
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values["num_hidden_layers"] == kind.layers_of_27b and type(hidden) is type(heads) is int and heads > 0:
        return hidden / heads
    return values["head_dim"]


def _stops(metadata: Mapping[str, Any]) -> list[Any]:
    keys = ("eos_token_id", "eot_token_id")
    stops = [metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata]
    return [stop for index, stop in enumerate(stops) if stop not in stops[:index]] or [1]


def _layer_types(path: Path, metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The kind of each layer, where the file says it: one global layer in so many, or whether each one is local."""
    pattern = metadata.get(f"{name}.attention.sliding_window_pattern")
    if pattern is None:
        return {}
    if isinstance(pattern, list):
        return {"layer_types": [LOCAL if local else GLOBAL for local in pattern]}
    layers = metadata[f"{name}.block_count"]
    if not (type(pattern) is type(layers) is int and 0 < pattern and layers <= 1024):
        raise InputError(f"{path}: {name}.attention.sliding_window_pattern is {shown(pattern)}", hint=HINT)
    return {"layer_types": [LOCAL if (i + 1) % pattern else GLOBAL for i in range(layers)]}


def _ropes(metadata: Mapping[str, Any], name: str, family: Family) -> dict[str, Any]:
    """The rotary embeddings. Scaled positions are those of the global layers."""
    keys = {GLOBAL: "rope.freq_base", LOCAL: "rope.freq_base_swa"}
    bases = {
        kind: {"rope_theta": metadata.get(f"{name}.{keys[kind]}", theta), "rope_type": "default"}
        for kind, theta in family.thetas.items()
    }
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        factor = metadata.get(f"{name}.rope.scaling.factor")
        bases[GLOBAL] |= {"rope_type": scaling, "factor": factor}
    return {"rope_parameters": bases if LOCAL in bases else bases[GLOBAL]}
