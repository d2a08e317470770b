"""Folders of Gemma 3 with an image encoder: the decoder is read from them, and it is that of transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.checkpoints import SHAPES, TINY_CONFIG, hf_logits, relative_error
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Checkpoint, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.model.kv_cache import RingCache
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe

IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def language_model_first(name: str) -> str:
    """A name of transformers 5 as transformers 4 wrote it."""
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name.removeprefix("model.")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "transformers 5": lambda name: name,
    "transformers 4": language_model_first,
    "without a head": lambda name: name.removeprefix("model."),
}


def make_folder(folder: Path, spelling: str, *, tied: bool = True) -> Any:
    """Save a random model under the names of a version of transformers."""
    torch.manual_seed(0)
    shape = {**TINY_CONFIG, **SHAPES["gemma3"], "model_type": "gemma3_text"}
    images: dict[str, Any] = {"vision_config": IMAGES, "mm_tokens_per_image": 4, "image_token_index": 300}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=shape, tie_word_embeddings=tied, **images))
    model.set_attn_implementation("eager")
    tensors = dict(model.state_dict())
    for name, value in tensors.items():
        if "norm" in name and "language_model" in name:
            value.normal_(0.0, 0.3)
    if tied:
        del tensors["lm_head.weight"]
    model.save_pretrained(folder)
    save_file({SPELLINGS[spelling](name): value for name, value in tensors.items()}, folder / "model.safetensors")
    return model


def logits(weights: Checkpoint, ids: Tensor) -> Tensor:
    cache = RingCache(weights.config, context=64, chunk=len(ids))
    with torch.no_grad():
        result: Tensor = weights.load()(ids[None], torch.tensor([0]), cache)[0]
    return result


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_decoder_is_that_of_transformers(spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_folder(tmp_path, spelling)
    ids = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        weights = Checkpoint.open(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "tensors of its image encoder are left out" in line and "\n" not in line
    assert relative_error(logits(weights, ids), hf_logits(model, ids)) < 1e-5


def test_a_head_of_its_own_is_found(tmp_path: Path) -> None:
    for spelling in ("transformers 5", "transformers 4"):
        model = make_folder(tmp_path / spelling, spelling, tied=False)
        weights = Checkpoint.open(tmp_path / spelling)
        assert not weights.config.tie_word_embeddings
        assert torch.equal(weights.matrix("lm_head"), model.lm_head.weight)


def test_what_is_quantized_is_a_folder_of_the_decoder_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "float", "transformers 5")
    source = Checkpoint.open(tmp_path / "float")
    write_quantized(source, make_recipe(32), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "gemma3_text" and raw["architectures"] == ["Gemma3ForCausalLM"]
    written = Checkpoint.open(tmp_path / "out")
    assert written.config == source.config
    ids = torch.arange(3, 20)
    assert torch.equal(logits(written, ids), logits(source, ids))


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_stop_ids_of_the_outer_level_are_used(tmp_path: Path) -> None:
    """Published folders name them there, and the inner level's default is the end of a text alone."""
    make_folder(tmp_path, "transformers 5")
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    edit(tmp_path, eos_token_id=[1, 106])
    assert GemmaConfig.from_hf(tmp_path).eos_token_id == (1, 106)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"architectures": ["SiglipModel"]}, "supported: Gemma3ForConditionalGeneration"),
        ({"text_config": [1]}, "text_config is a list"),
        ({"text_config": {"model_type": "llama"}}, 'model_type is "llama"'),
        ({"text_config": {"head_dim": "x"}}, "head_dim is"),
        ({"model_type": "gemma3n"}, 'model_type is "gemma3n"'),
    ],
)
def test_another_model_inside_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    edit(tmp_path, **keys)
    with pytest.raises(InputError, match=words):
        GemmaConfig.from_hf(tmp_path)


def test_an_image_encoder_in_a_folder_of_the_decoder_alone_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Only a folder that says so may hold one: elsewhere it is a part of another model."""
    (tmp_path / "config.json").write_text((checkpoint("gemma3") / "config.json").read_text())
    tensors = load_file(checkpoint("gemma3") / "model.safetensors")
    save_file({**tensors, "vision_tower.patch.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="vision_tower.patch.weight, which Gemma3ForCausalLM does not have"):
        Checkpoint.open(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's, of tied tables
def test_an_adapter_of_the_whole_model_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    """Its weights have the names of the whole model, and so have the patterns of its configuration."""
    model = make_folder(tmp_path / "base", "transformers 4")
    torch.manual_seed(1)
    trained: Any = get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|down_proj)",
            alpha_pattern={"model.language_model.layers.2.self_attn.q_proj": 40},
        ),
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    trained.save_pretrained(str(tmp_path / "adapter"))
    merged = trained.merge_and_unload().state_dict()
    plain, weights = (Checkpoint.open(tmp_path / "base", lora=lora) for lora in (None, tmp_path / "adapter"))
    changed = 0
    for name in weight_shapes(weights.config):
        expected = merged[f"{name}.weight".replace("model.", "model.language_model.", 1)]
        assert_close(weights.matrix(name), expected, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(weights.matrix(name), plain.matrix(name))
    assert changed == 2 * weights.config.num_hidden_layers
