"""An adapter merged tensor by tensor against PEFT's own merge; what is not plain LoRA is refused by name."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO, hf_logits, hf_model, hf_quantized, make_checkpoint, relative_error
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2ForCausalLM

from gemma_edge.bundle.codec import shown
from gemma_edge.errors import InputError
from gemma_edge.model import layerwise
from gemma_edge.model.checkpoint import Checkpoint, norm_names, weight_shapes
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe

# PEFT warns that pattern keys without a match are ignored (as they must be here, too), and of tied tables
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

Q_PROJ, UP_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": EVERY_LINEAR},
    "two of seven": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"r": 4, "lora_alpha": 4, "target_modules": EVERY_LINEAR, "layers_to_transform": [2]},
    "rank-stabilised": {"r": 9, "lora_alpha": 6, "target_modules": EVERY_LINEAR, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY_LINEAR,
        "rank_pattern": {r"layers\.2\.mlp\.up_proj": 6, "v_proj": 2, "proj": 5},
        "alpha_pattern": {"q_proj": 16, "model.layers.0.self_attn.k_proj": 2, "j": 99},
    },
    "stabilised patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY_LINEAR,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"q_proj": 16},
    },
}


def trained_model(folder: Path, out: Path, resize: int | None = None, **options: Any) -> PeftModel:
    """Save an adapter with random values as PEFT saves it."""
    torch.manual_seed(1)
    base = hf_model(folder)
    if resize:
        base.resize_token_embeddings(resize)
    model = get_peft_model(base, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # the halves B are zero before training
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(str(out))
    return model


def found_logits(weights: Checkpoint, ids: Tensor) -> Tensor:
    return layerwise.logits(weights, layerwise.hidden_states(weights, ids, len(ids)))


def train(folder: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    """As `trained_model`; returns the weights that PEFT merges."""
    merged: dict[str, Tensor] = trained_model(folder, out, **options).merge_and_unload().state_dict()
    return merged


@pytest.fixture(scope="module")
def trained(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(checkpoint("tiny"), out, **KINDS["two of seven"])
    return out


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A plain adapter to damage."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def configure(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors")


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(base, lora=adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("base", ["tiny", "gemma1", "gemma3_scaled"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_merged_weights_are_those_of_peft(
    options: dict[str, Any], base: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(base)
    merged, plain = train(folder, tmp_path, **options), Checkpoint.open(folder)
    weights = Checkpoint.open(folder, lora=tmp_path)
    touched = 0
    for name in weight_shapes(weights.config):
        found, expected = weights.matrix(name), merged[f"{name}.weight"]
        assert_close(found, expected, rtol=0.0, atol=0.0)
        if weights.dtype(name) == torch.float32 and (found - plain.matrix(name)).abs().max() > 0.1:
            touched += 1
    per_layer = len(options["target_modules"])
    assert touched == per_layer * len(options.get("layers_to_transform", range(weights.config.num_hidden_layers)))
    for name in norm_names(weights.config):
        assert_close(weights.vector(name), merged[name], rtol=0.0, atol=0.0)


def test_a_merged_weight_is_float32_and_an_untouched_one_keeps_its_type_and_bits(
    checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path
) -> None:
    """The product of two halves does not fit into bfloat16: rounding it back would lose what was learnt."""
    base = tmp_path / "bf16"
    Gemma2ForCausalLM.from_pretrained(checkpoint("tiny"), dtype=torch.bfloat16).save_pretrained(base)
    plain, weights = Checkpoint.open(base), Checkpoint.open(base, lora=adapter)
    assert weights.dtype(Q_PROJ) == torch.float32
    assert weights.dtype(UP_PROJ) == torch.bfloat16
    assert_close(weights.matrix(UP_PROJ), plain.matrix(UP_PROJ), rtol=0.0, atol=0.0)
    state = load_file(adapter / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{Q_PROJ}.lora_{side}.weight"] for side in "AB")
    expected = plain.matrix(Q_PROJ).double() + 5 / 3 * b.double() @ a.double()
    assert_close(weights.matrix(Q_PROJ).double(), expected, rtol=1e-6, atol=1e-6)  # as above


def test_row_slices_of_a_merged_weight_are_rows_of_the_whole(checkpoint: Callable[..., Path], adapter: Path) -> None:
    weights = Checkpoint.open(checkpoint("tiny"), lora=adapter)
    whole = weights.matrix(Q_PROJ)
    for start, stop in [(0, 1), (5, 90), (127, 128)]:
        # the matrix product may add in another order for another number of rows
        assert_close(weights.rows(Q_PROJ, start, stop), whole[start:stop], rtol=1e-6, atol=1e-6)


def test_halves_saved_as_bfloat16_are_multiplied_in_float32(checkpoint: Callable[..., Path], adapter: Path) -> None:
    edit(adapter, lambda state: state.update({key: value.bfloat16() for key, value in state.items()}))
    state = load_file(adapter / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{Q_PROJ}.lora_{side}.weight"].double() for side in "AB")
    plain = Checkpoint.open(checkpoint("tiny")).matrix(Q_PROJ)
    found = Checkpoint.open(checkpoint("tiny"), lora=adapter).matrix(Q_PROJ)
    assert_close(found.double(), plain.double() + 5 / 3 * b @ a, rtol=1e-6, atol=1e-6)  # as above


def test_keys_without_pefts_prefix_and_with_the_adapters_name_are_read(
    checkpoint: Callable[..., Path], adapter: Path
) -> None:
    expected = Checkpoint.open(checkpoint("tiny"), lora=adapter).matrix(Q_PROJ)

    def rename(state: dict[str, Tensor]) -> None:
        for key in list(state):
            new = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            state[new] = state.pop(key)

    edit(adapter, rename)
    found = Checkpoint.open(checkpoint("tiny"), lora=adapter).matrix(Q_PROJ)
    assert_close(found, expected, rtol=0.0, atol=0.0)


def test_text_is_read_by_the_adapters_own_tokenizer(
    checkpoint: Callable[..., Path], adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Checkpoint.open(checkpoint("tiny"), lora=adapter).text_folder == checkpoint("tiny")
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with caplog.at_level("WARNING"):
        Checkpoint.open(checkpoint("tiny"), lora=adapter)
    assert "chat_template.jinja is not used: the adapter has no tokenizer.json" in caplog.text
    shutil.copy(DEMO / "tokenizer.json", adapter)
    assert Checkpoint.open(checkpoint("tiny"), lora=adapter).text_folder == adapter


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "LOHA"},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "use_qalora": {"use_qalora": True},
    "layer_replication": {"layer_replication": [[0, 3], [2, 4]]},
}
NEVER_MERGED = ("lora_bias", "alora_invocation_tokens", "layer_replication")  # by PEFT either


@pytest.mark.parametrize(("key", "changes"), NOT_PLAIN.items(), ids=NOT_PLAIN.keys())
def test_other_kinds_of_adapters_are_refused_by_key(
    key: str, changes: dict[str, Any], checkpoint: Callable[..., Path], adapter: Path
) -> None:
    configure(adapter, **changes)
    found = refusal(checkpoint("tiny"), adapter)
    assert f"{key} is {shown(changes[key])}" in found and str(adapter / "adapter_config.json") in found
    assert ("merge_and_unload" in found) == (key not in NEVER_MERGED)


MERGED_BY_PEFT: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [3, 9]},
    "pissa": {"init_lora_weights": "pissa"},
    "dora of a saved head": {"use_dora": True, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", MERGED_BY_PEFT.values(), ids=MERGED_BY_PEFT.keys())
def test_what_is_refused_is_accepted_once_peft_has_merged_it(
    options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The advice in the message led to a second refusal where the merged model had a head of its own."""
    folder = checkpoint("tiny")
    model = trained_model(folder, tmp_path / "adapter", target_modules=["q_proj"], **options)
    assert "merge_and_unload, then save_pretrained" in refusal(folder, tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_holds(Checkpoint.open(tmp_path / "merged"), merged.state_dict())


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "XLORA"])
def test_what_no_weight_can_hold_is_not_sent_to_peft(kind: str, checkpoint: Callable[..., Path], adapter: Path) -> None:
    configure(adapter, peft_type=kind)
    found = refusal(checkpoint("tiny"), adapter)
    assert "merge_and_unload" not in found and "train a plain LoRA" in found


def assert_holds(weights: Checkpoint, merged: dict[str, Tensor]) -> None:
    """Every matrix and norm, bit for bit, and the same head."""
    tied = torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert weights.config.tie_word_embeddings == tied
    assert weights.config.vocab_size == len(merged["model.embed_tokens.weight"])
    for name in weight_shapes(weights.config):
        assert_close(weights.matrix(name), merged[f"{name}.weight"], rtol=0.0, atol=0.0)
    for name in norm_names(weights.config):
        assert_close(weights.vector(name), merged[name], rtol=0.0, atol=0.0)


SAVED_WHOLE: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "table": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both, kept tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "norms and linears": {"modules_to_save": ["norm", "up_proj"]},
    "more rows": {"resize": 330},
    "fewer rows": {"resize": 290},
    "more rows, trained": {"resize": 330, "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("base", ["tiny", "untied", "gemma1", "gemma3_scaled"])
@pytest.mark.parametrize("options", SAVED_WHOLE.values(), ids=SAVED_WHOLE.keys())
def test_modules_that_are_saved_whole_take_the_place_of_the_models(
    options: dict[str, Any], base: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """They were refused, and so was the merged model that the message asked for, if its head was then its own."""
    folder = checkpoint(base)
    merged = train(folder, tmp_path, target_modules=["q_proj"], **options)
    weights = Checkpoint.open(folder, lora=tmp_path)
    assert_holds(weights, merged)
    assert weights.config.num_parameters == sum(
        len(merged[f"{name}.weight"].flatten()) for name in weight_shapes(weights.config)
    ) + sum(len(merged[name]) for name in norm_names(weights.config))


def test_saved_modules_without_a_lora_are_an_adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    merged = train(checkpoint("tiny"), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit(tmp_path, lambda s: [s.pop(key) for key in list(s) if "lora_" in key])
    weights = Checkpoint.open(checkpoint("tiny"), lora=tmp_path)
    assert_close(weights.matrix("lm_head"), merged["lm_head.weight"], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("rows", [330, 290])
def test_a_quantized_checkpoint_of_an_adapter_is_loaded_by_transformers(
    rows: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its config.json needs the adapter's number of tokens and its head."""
    base, adapter = checkpoint("tiny"), tmp_path / "adapter"
    merged = train(base, adapter, resize=rows, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    source = Checkpoint.open(base, lora=adapter)
    quantized = write_quantized(source, make_recipe(4), tmp_path / "out")
    assert quantized.config == source.config
    state = hf_quantized(tmp_path / "out").state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert_close(state[name], merged[name], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("part", ["modules_to_save.weight", "modules_to_save.default.weight"])
def test_names_of_saved_modules_in_other_versions_of_peft_are_read(
    part: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    merged = train(checkpoint("tiny"), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])

    def rename(state: dict[str, Tensor]) -> None:
        state[f"base_model.model.lm_head.{part}"] = state.pop("base_model.model.lm_head.weight")
        state["base_model.model.lm_head.original_module.weight"] = torch.zeros(320, 64)

    edit(tmp_path, rename)
    assert_holds(Checkpoint.open(checkpoint("tiny"), lora=tmp_path), merged)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
@pytest.mark.parametrize("base", ["tiny", "untied"])
def test_updates_of_table_and_head_are_those_of_the_trained_model(
    targets: list[str], base: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Where the two are tied, PEFT's merge adds an update of one to both, and warns of it; the trained model has it in one."""
    model = trained_model(checkpoint(base), tmp_path, target_modules=["q_proj", *targets])
    weights = Checkpoint.open(checkpoint(base), lora=tmp_path)
    ids = torch.arange(3, 27)
    assert relative_error(found_logits(weights, ids), hf_logits(model.get_base_model(), ids)) <= 1e-5
    if base == "untied":
        merged = model.merge_and_unload().state_dict()
        for name in ("lm_head", "model.embed_tokens"):
            # the product may add in another order where PEFT multiplies the transposed halves
            assert_close(weights.matrix(name), merged[f"{name}.weight"], rtol=1e-6, atol=1e-6)


def test_an_update_of_a_table_with_other_rows_needs_no_head(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT saves the table under the update, but not the head, which is that table where they are tied."""
    model = trained_model(checkpoint("tiny"), tmp_path, 330, target_modules=["q_proj", "embed_tokens"])
    weights = Checkpoint.open(checkpoint("tiny"), lora=tmp_path)
    ids = torch.arange(303, 327)
    assert relative_error(found_logits(weights, ids), hf_logits(model.get_base_model(), ids)) <= 1e-5


def test_a_module_that_was_trained_but_not_saved_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    train(checkpoint("tiny"), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head", "classifier"])
    edit(tmp_path, lambda s: s.pop("base_model.model.lm_head.weight"))
    found = refusal(checkpoint("tiny"), tmp_path)
    assert 'modules_to_save names "lm_head", but adapter_model.safetensors holds no lm_head.weight' in found


def test_a_table_with_other_rows_than_the_head_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    train(checkpoint("tiny"), tmp_path, resize=330, target_modules=["q_proj"])
    edit(tmp_path, lambda s: s.pop("base_model.model.lm_head.weight"))
    found = refusal(checkpoint("tiny"), tmp_path)
    assert (
        "lm_head [320] and model.embed_tokens [330]" in found or "model.embed_tokens [330] and lm_head [320]" in found
    )
    assert "save_embedding_layers=True" in found


def test_stop_ids_beyond_a_smaller_table_are_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", eos_token_id=[1, 310])
    train(base, tmp_path / "adapter", resize=300, target_modules=["q_proj"])
    assert "eos_token_id[1] is 310; it must be below vocab_size, 300" in refusal(base, tmp_path / "adapter")


A_KEY, B_KEY = (f"base_model.model.{Q_PROJ}.lora_{side}.weight" for side in "AB")
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "unknown weight": (
        lambda s: s.update({A_KEY.replace("layers.1", "layers.9"): torch.ones(3, 64)}),
        r"layers\.9\.self_attn\.q_proj\.lora_A\.weight is not a LoRA of a weight of this model; pass the model that",
    ),
    "head": (
        lambda s: s.update({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 64)}),
        r"lm_head has only lora_A; the other half is missing",
    ),
    "magnitude": (
        lambda s: s.update({A_KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(128)}),
        r"lora_magnitude_vector is not a LoRA",
    ),
    "B is missing": (lambda s: s.pop(B_KEY), f"{Q_PROJ} has only lora_A; the other half is missing"),
    "A is missing": (lambda s: s.pop(A_KEY), f"{Q_PROJ} has only lora_B; the other half is missing"),
    "A of another width": (
        lambda s: s.update({A_KEY: torch.ones(3, 63)}),
        Q_PROJ + r" has a LoRA of \[128, 3\] x \[3, 63\], the weight is \[128, 64\]",
    ),
    "B of another height": (
        lambda s: s.update({B_KEY: torch.ones(127, 3)}),
        Q_PROJ + r" has a LoRA of \[127, 3\] x \[3, 64\], the weight is \[128, 64\]",
    ),
    "halves of two ranks": (lambda s: s.update({A_KEY: torch.ones(2, 64)}), r"\[128, 3\] x \[2, 64\]"),
    "another rank than declared": (
        lambda s: s.update({A_KEY: torch.ones(2, 64), B_KEY: torch.ones(128, 2)}),
        f"LoRA of {Q_PROJ} has rank 2, adapter_config.json says 3",
    ),
    "saved linear of another shape": (
        lambda s: s.update({f"base_model.model.{UP_PROJ}.weight": torch.ones(64, 128)}),
        UP_PROJ + r"\.weight has shape \[64, 128\], config\.json asks for \[128, 64\]",
    ),
    "saved integers": (
        lambda s: s.update({f"base_model.model.{UP_PROJ}.weight": torch.ones(128, 64).to(torch.int8)}),
        UP_PROJ + r"\.weight is I8; supported",
    ),
    "saved table without axes": (
        lambda s: s.update({"base_model.model.model.embed_tokens.weight": torch.tensor(1.0)}),
        r"embed_tokens\.weight has shape \[\]|different numbers of rows",
    ),
    "bias": (
        lambda s: s.update({f"base_model.model.{UP_PROJ}.bias": torch.ones(128)}),
        r"up_proj\.bias is not a LoRA of a weight of this model; merge it with PEFT",
    ),
    "a norm's LoRA": (
        lambda s: s.update(
            {
                "base_model.model.model.norm.lora_A.weight": torch.ones(3, 64),
                "base_model.model.model.norm.lora_B.weight": torch.ones(64, 3),
            }
        ),
        r"model\.norm has a LoRA of \[64, 3\] x \[3, 64\], the weight is \[64\]",
    ),
    "A is a number": (lambda s: s.update({A_KEY: torch.tensor(1.0)}), r"half a LoRA has two axes"),
    "nothing": (lambda s: s.clear(), "holds no LoRA weight"),
    "A is flat": (lambda s: s.update({A_KEY: torch.ones(192)}), Q_PROJ),
}


@pytest.mark.parametrize(("change", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_halves_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object], words: str, checkpoint: Callable[..., Path], adapter: Path
) -> None:
    edit(adapter, change)
    assert re.search(words, refusal(checkpoint("tiny"), adapter))


def test_an_adapter_of_a_larger_model_is_refused(checkpoint: Callable[..., Path], adapter: Path) -> None:
    assert "the weight is [96, 160]" in refusal(checkpoint("odd_sizes"), adapter)


def test_missing_and_damaged_files_are_named(checkpoint: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base, weights = checkpoint("tiny"), adapter / "adapter_model.safetensors"
    assert "has no adapter_config.json" in refusal(base, tmp_path / "nowhere")
    weights.write_bytes(weights.read_bytes()[:-10])
    assert f"{weights} is damaged or truncated" in refusal(base, adapter)
    weights.rename(adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors; pickle adapters are not read" in refusal(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert f"{adapter / 'adapter_config.json'} is not valid JSON" in refusal(base, adapter)


def test_a_lora_that_is_not_finite_is_named_when_read(checkpoint: Callable[..., Path], adapter: Path) -> None:
    edit(adapter, lambda state: state[B_KEY].fill_(torch.nan))
    weights = Checkpoint.open(checkpoint("tiny"), lora=adapter)
    with pytest.raises(InputError, match=Q_PROJ):
        weights.matrix(Q_PROJ)


WRONG_VALUES: dict[str, list[Any]] = {
    "r": ["3", 0, 2.5, True, [3]],
    "lora_alpha": ["8", None, [], True, 1e21, math.inf, math.nan],
    "alpha_pattern": ["x", 3, [], {"a": "b"}, {"(": 1}],
    "rank_pattern": ["x", 3, [], {"a": "b"}, {"(": 1}],
    "use_rslora": ["yes"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_VALUES.items() for value in values])
def test_a_value_that_no_adapter_can_have_is_named(
    key: str, value: object, checkpoint: Callable[..., Path], adapter: Path
) -> None:
    """A pattern that was a text or not a regular expression ended in a traceback."""
    configure(adapter, **{key: value})
    found = refusal(checkpoint("tiny"), adapter)
    assert f"{adapter / 'adapter_config.json'}: " in found and (key in found or "regular expression" in found)


def test_a_pattern_of_an_adapter_cannot_run_for_ever(checkpoint: Callable[..., Path], adapter: Path) -> None:
    """Python's `re` goes back through all ways to cut a name into pieces, and this test would not end."""
    expected = Checkpoint.open(checkpoint("tiny"), lora=adapter).matrix(Q_PROJ)
    configure(adapter, alpha_pattern={r"([a-z0-9._]+)+!": 3}, rank_pattern={r"(\w|\w\w|[._])+!": 3})
    assert torch.equal(Checkpoint.open(checkpoint("tiny"), lora=adapter).matrix(Q_PROJ), expected)
    configure(adapter, alpha_pattern={"(?=a)": 3})
    assert "alpha_pattern has a regular expression that is not read" in refusal(checkpoint("tiny"), adapter)
