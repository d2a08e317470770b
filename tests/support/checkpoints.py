"""One tiny configuration, checkpoints of it made by transformers and not by us, and transformers as the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaForCausalLM,
)
from transformers import GemmaConfig as HFGemmaConfig

from gemma_edge.bundle.accelerators import Accelerator
from gemma_edge.bundle.codec import convert
from gemma_edge.bundle.entries import BackendEntry, ModelEntry, PlanEntry, RecipeEntry, TargetEntry
from gemma_edge.bundle.geometry import CacheGeometry
from gemma_edge.bundle.manifest import (
    MANIFEST,
    Manifest,
    list_files,
    typed_config,
    typed_settings,
    with_identities,
)
from gemma_edge.errors import InputError
from gemma_edge.model.config import HEAD, GemmaConfig
from gemma_edge.model.quantized import QuantConfig
from gemma_edge.quantize.recipe import Recipe

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "tiny-gemma2"
TEXTS = ROOT / "src" / "gemma_edge" / "text" / "data"
# The window is shorter than the sequences (24 and more), so that the ring wraps; weights of deviation 1 make the softcaps bite.
TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "initializer_range": 1.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "heads_like_27b": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "query_pre_attn_scalar": 24},
    "starts_global": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    "odd_sizes": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2},
    "no_softcaps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "untied": {"tie_word_embeddings": False},
    "gemma3": {"model_type": "gemma3_text", "num_hidden_layers": 7},  # five local layers, a global one, a local one
    "gemma3_scaled": {  # begins with a global layer, whose positions are divided
        "model_type": "gemma3_text",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
        },
    },
    # nothing normalises Gemma 1's branches: with deviation 1 transformers is 2e-5 away from its own float64, with 0.3 it is 6e-6.
    # With an int8 cache such differences become steps of the rounding: that takes 0.1, where it is 2e-7.
    "gemma1": {"model_type": "gemma", "num_attention_heads": 8, "head_dim": 24, "initializer_range": 0.3},
    "gemma1_one_head": {
        "model_type": "gemma",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.1,
    },
    "gemma3_odd": {  # the pattern begins and ends in its middle; five query heads, which together are wider than the model
        "model_type": "gemma3_text",
        "hidden_size": 80,
        "intermediate_size": 144,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "query_pre_attn_scalar": 33,
        "sliding_window": 5,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            *["sliding_attention"] * 2,
            "full_attention",
            "sliding_attention",
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
    },
}
# HF_CLASSES: transformers' configuration and model by `model_type`
HF_CLASSES = {
    "gemma": (HFGemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
HFModel = GemmaForCausalLM | Gemma2ForCausalLM | Gemma3ForCausalLM


def make_checkpoint(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Gemma 2, or another `model_type`, in Hugging Face's format, norms included.

    Keys that the family does not have go into its config.json too: both sides must read past them.
    """
    config_class, model_class = HF_CLASSES[overrides.pop("model_type", "gemma2")]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**TINY_CONFIG, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return folder


SCHEME_OF_LLM_COMPRESSOR: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "observer": "minmax",
    "observer_kwargs": {},
    "symmetric": True,
    "type": "int",
}


def llm_compressor_folder(
    original: Path, out: Path, config: QuantConfig, scale_dtype: torch.dtype, ignore: tuple[str, ...] = (HEAD,)
) -> Path:
    """A folder as llm-compressor writes it: one file, a bfloat16 table, codes down to -8 and -128."""
    from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
        pack_to_int32,  # here, because most tests need no such folder and its import takes seconds
    )

    raw = json.loads((original / "config.json").read_text())
    state: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for name, value in load_file(original / "model.safetensors").items():
        if "_proj" not in name and (name != f"{HEAD}.weight" or HEAD in ignore):
            state[name] = value.to(torch.bfloat16)
            continue
        high, (rows, columns) = 1 << (config.bits - 1), value.shape
        groups = columns // config.group_size if config.group_size else 1
        codes = torch.randint(-high, high, value.shape, generator=draw).to(torch.int8)
        state[f"{name}_packed"] = pack_to_int32(codes, config.bits)
        state[f"{name}_scale"] = (torch.rand(rows, groups, generator=draw) / high + 0.01).to(scale_dtype)
        state[f"{name}_shape"] = torch.tensor([rows, columns])
    strategy = {"strategy": "group", "group_size": config.group_size} if config.group_size else {"strategy": "channel"}
    raw["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {"num_bits": config.bits, "group_size": None, **strategy, **SCHEME_OF_LLM_COMPRESSOR},
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    out.mkdir()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(raw))
    return out


def write_manifest(
    bundle: Path,
    config: GemmaConfig,
    recipe: Recipe,
    cache: CacheGeometry,
    backends: dict[str, dict[str, Any]],
    *,
    tokenizer: bool = False,
    accelerator: Accelerator = "cpu",
) -> None:
    """The manifest of a bundle that a backend has written its files into: not verified."""
    manifest = Manifest(
        model=ModelEntry("test", config.architecture, config.num_parameters, lora=None),
        config=typed_config(config.to_json()),
        recipe=convert({**recipe.to_json(), "parts": [], "calibration": {}}, RecipeEntry),
        target=TargetEntry("test", ram_bytes=0, threads=2),
        backends={
            name: BackendEntry(
                cache,
                replace(plan_of(cache, name), accelerator=accelerator),
                typed_settings(name, settings),
                identity="",
                accelerator=accelerator,
            )
            for name, settings in backends.items()
        },
        files=list_files(bundle),
        tokenizer=tokenizer,
        tools={},
        verification={},
        created="",
    )
    (bundle / MANIFEST).write_text(with_identities(manifest).to_json())


def plan_of(cache: CacheGeometry, backend: str) -> PlanEntry:
    """A plan that agrees with a cache and predicts nothing else."""
    return PlanEntry(
        target="test",
        backend=backend,
        recipe="float32",
        context=cache.context,
        prefill_chunk=cache.prefill_chunk,
        pinned=cache.pinned,
        kv_dtype=cache.dtype,
        weights_bytes=0,
        kv_bytes=cache.bytes,
        device_ram_bytes=0,
        device_ram_limit_bytes=1 << 30,
        export_ram_bytes=0,
        export_disk_bytes=0,
    )


def hf_model(folder: Path) -> HFModel:
    """The reference that no one here wrote: transformers, eager attention, float32."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model: HFModel = loaded
    return model


def hf_quantized(folder: Path) -> Any:
    """transformers' own reading of a quantized folder; every tensor must find its place, and none be made up."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model


def hf_holding(folder: Path, weights: Mapping[str, torch.Tensor]) -> HFModel:
    """The float model of a folder with other weights, all of them; with a head among them it is untied."""
    model = hf_model(folder)
    if "lm_head.weight" in weights:
        head: Any = model.get_submodule("lm_head")
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    keys = model.load_state_dict(dict(weights), strict=False)
    assert keys.unexpected_keys == [] and keys.missing_keys in ([], ["lm_head.weight"])
    return model


def hf_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(T,) int64 -> logits (T, V) of the whole sequence at once, without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def hf_windowed(
    model: HFModel, ids: torch.Tensor, *, local_window: int, global_window: int, start: int = 0, pinned: int = 0
) -> torch.Tensor:
    """As `hf_logits`, with an explicit window per kind of layer: a global layer sees the context and no more.

    Args:
        model: transformers' own.
        ids: (T,) int64.
        local_window: tokens that a local layer sees.
        global_window: tokens that a global layer sees.
        start: position of the first token.
        pinned: tokens at the beginning that a global layer also sees.
    """
    position = torch.arange(len(ids))
    age = position[:, None] - position[None, :]  # (T, T)

    def mask(window: int, pinned: int = 0) -> torch.Tensor:
        hidden = (age < 0) | ((age >= window) & (position >= pinned))
        return torch.zeros(1, 1, *age.shape).masked_fill(hidden, torch.finfo(torch.float32).min)  # (1, 1, T, T)

    masks: Any = {"sliding_attention": mask(local_window), "full_attention": mask(global_window, pinned)}
    if isinstance(model, GemmaForCausalLM):
        masks = masks["full_attention"]
    with torch.no_grad():
        logits: torch.Tensor = model(
            ids[None], attention_mask=masks, position_ids=start + position[None], use_cache=False
        ).logits[0]
    return logits


def kl_divergence(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Of logits (T, V), mean over positions, in nats."""
    p, q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference as a part of the reference's range."""
    return float((found - reference).abs().max() / (reference.max() - reference.min()))


# SAME_NAMES: keys of a config of transformers that a GemmaConfig takes over as they are.
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rms_norm_eps",
    "bos_token_id",
)


def config_values(hf: Any) -> dict[str, Any]:
    """Fields of GemmaConfig that have the same name in a config of transformers."""
    eos = hf.eos_token_id
    return {
        "layer_types": tuple(hf.layer_types),
        "query_pre_attn_scalar": float(hf.query_pre_attn_scalar),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else (eos,),
        **{name: getattr(hf, name) for name in SAME_NAMES},
    }


def save_config(folder: Path, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def config_refusal(folder: Path) -> str:
    """The message of the InputError, which must be one line that names the file."""
    with pytest.raises(InputError) as caught:
        GemmaConfig.from_hf(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message
