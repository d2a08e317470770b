"""A LoRA merged tensor by tensor against PEFT's own merge; what is not plain LoRA is refused by name."""

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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO, hf_model
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2ForCausalLM

from gemma_edge.bundle.codec import shown
from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Checkpoint, norm_names, weight_shapes

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


def train(folder: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter with random halves as PEFT saves it, and return the weights that PEFT merges."""
    torch.manual_seed(1)
    model = get_peft_model(hf_model(folder), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B is zero before training
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(str(out))
    merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
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


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_merged_weights_are_those_of_peft(
    options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("tiny")
    merged, plain = train(folder, tmp_path, **options), Checkpoint.open(folder)
    weights = Checkpoint.open(folder, lora=tmp_path)
    touched = 0
    for name in weight_shapes(weights.config):
        found, expected = weights.matrix(name), merged[f"{name}.weight"]
        # weight and update are of size 1 to 30, and PEFT multiplies by the scaling after the product, we inside it: some
        # roundings of 6e-8 each
        assert_close(found, expected, rtol=1e-6, atol=1e-6)
        if weights.dtype(name) == torch.float32 and (found - plain.matrix(name)).abs().max() > 0.1:
            touched += 1
    per_layer = len(options["target_modules"])
    assert touched == per_layer * len(options.get("layers_to_transform", range(4)))
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


def test_text_is_read_by_the_adapters_own_tokenizer(checkpoint: Callable[..., Path], adapter: Path) -> None:
    assert Checkpoint.open(checkpoint("tiny"), lora=adapter).text_folder == checkpoint("tiny")
    shutil.copy(DEMO / "tokenizer.json", adapter)
    assert Checkpoint.open(checkpoint("tiny"), lora=adapter).text_folder == adapter


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "LOHA"},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["mlp.experts"]},
}
NOT_PLAIN_AND_NOT_REFUSED: dict[str, dict[str, Any]] = {
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "use_qalora": {"use_qalora": True},
}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        *NOT_PLAIN.items(),
        *(pytest.param(*case) for case in NOT_PLAIN_AND_NOT_REFUSED.items()),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_key(
    key: str, changes: dict[str, Any], checkpoint: Callable[..., Path], adapter: Path
) -> None:
    configure(adapter, **changes)
    found = refusal(checkpoint("tiny"), adapter)
    assert f"{key} is {shown(changes[key])}" in found and str(adapter / "adapter_config.json") in found


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
    ids=["dora", "saved head", "table", "bias"],
)
def test_other_kinds_are_refused_as_peft_saves_them(
    options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    train(checkpoint("tiny"), tmp_path, r=2, **options)
    assert str(tmp_path) in refusal(checkpoint("tiny"), tmp_path)


def test_an_adapter_that_changes_its_base_is_not_merged_into_the_original(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("tiny")
    merged = train(folder, tmp_path, r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    try:
        weights = Checkpoint.open(folder, lora=tmp_path)
    except InputError:
        return
    assert_close(weights.matrix(Q_PROJ), merged[f"{Q_PROJ}.weight"], rtol=1e-5, atol=1e-5)


A_KEY, B_KEY = (f"base_model.model.{Q_PROJ}.lora_{side}.weight" for side in "AB")
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "unknown weight": (
        lambda s: s.update({A_KEY.replace("layers.1", "layers.9"): torch.ones(3, 64)}),
        r"layers\.9\.self_attn\.q_proj\.lora_A\.weight is not a LoRA of a weight of this model",
    ),
    "head": (
        lambda s: s.update({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 64)}),
        r"lm_head\.lora_A\.weight is not a LoRA of a weight of this model",
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
    assert f"{adapter / 'adapter_config.json'}: " in found and (key in found or "not a regular expression" in found)
