"""Shared by all tests: one tiny configuration, checkpoints of it made by transformers and not by us, and the demo's bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM
from transformers import Gemma2Config as HFConfig

import gemma_edge
from gemma_edge.export import pipeline
from gemma_edge.export.bundle import MANIFEST, BackendEntry, CacheGeometry, Manifest, list_files
from gemma_edge.export.cache import VARIABLE
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.pipeline import Export
from gemma_edge.model.config import Gemma2Config
from gemma_edge.quantize.recipe import Recipe
from gemma_edge.runtimes.base import RUNTIMES, Runtime, how_to_install

# The models here are so small that two threads wait for each other longer than they compute: 85 s instead of 3 on a busy machine.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "tiny-gemma2"

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
}


def make_checkpoint(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Gemma 2 in Hugging Face's format, norms included."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(HFConfig(**{**TINY_CONFIG, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return folder


def write_manifest(
    bundle: Path,
    config: Gemma2Config,
    recipe: Recipe,
    cache: CacheGeometry,
    backends: dict[str, dict[str, Any]],
    *,
    tokenizer: bool = False,
) -> None:
    """The manifest of a bundle that a backend has written its files into: not verified."""
    manifest = Manifest(
        model={"name": "test"},
        config=config.to_json(),
        recipe=recipe.to_json(),
        target={"name": "test", "threads": 2},
        backends={name: BackendEntry(cache, {}, settings) for name, settings in backends.items()},
        files=list_files(bundle),
        tokenizer=tokenizer,
        tools={},
        verification={},
        created="",
    )
    (bundle / MANIFEST).write_text(manifest.to_json())


def hf_model(folder: Path) -> Gemma2ForCausalLM:
    """The reference that no one here wrote: transformers, eager attention, float32."""
    model: Gemma2ForCausalLM = Gemma2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model


def hf_quantized(folder: Path) -> Any:
    """transformers' own reading of a quantized folder; every tensor must find its place, and none be made up."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model


def hf_holding(folder: Path, weights: Mapping[str, torch.Tensor]) -> Gemma2ForCausalLM:
    """The float model of a folder with other weights, all of them."""
    model = hf_model(folder)
    keys = model.load_state_dict(dict(weights), strict=False)
    assert keys.unexpected_keys == [] and keys.missing_keys in ([], ["lm_head.weight"])
    return model


def hf_logits(model: Gemma2ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(T,) int64 -> logits (T, V) of the whole sequence at once, without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference as a part of the reference's range."""
    return float((found - reference).abs().max() / (reference.max() - reference.min()))


@pytest.fixture(scope="session", autouse=True)
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this run's calibrations are kept, those of commands included: never the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("tiny")`: the folder of a named shape, made once a session."""
    made: dict[str, Path] = {}

    def make(shape: str = "tiny") -> Path:
        if shape not in made:
            made[shape] = make_checkpoint(tmp_path_factory.mktemp(shape), **SHAPES[shape])
        return made[shape]

    return make


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, calibrations: Path) -> Export:
    """The demo model's bundle by the real pipeline, once a session; its integers lie beside it in `checkpoint`."""
    folder = tmp_path_factory.mktemp("demo")
    options = ExportOptions(model=str(DEMO), out=folder / "bundle", save_checkpoint=folder / "checkpoint")
    return pipeline.export(options)


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The demo model, which makes sense now and then, with every backend that is installed; its context is soon full."""
    options = ExportOptions(
        model=str(DEMO),
        out=tmp_path_factory.mktemp("talking") / "bundle",
        bits=4,
        group_size=32,
        method="rtn",
        context=48,
        prefill_chunk=7,
        kv_bits=32,
        backend=",".join(name for name in RUNTIMES if how_to_install(name) is None),
        verify="none",
    )
    return pipeline.export(options)


@pytest.fixture(params=RUNTIMES)
def talker(request: pytest.FixtureRequest, talking: Export) -> Runtime:
    """`talking` in each backend."""
    if command := how_to_install(request.param):
        pytest.skip(f"{request.param} is not installed: {command}")
    return gemma_edge.load(talking.bundle, backend=request.param, threads=1)
