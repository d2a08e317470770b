"""Reading a folder tensor by tensor: shards, types, and one line for every kind of damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import hf_logits, hf_model, make_checkpoint, relative_error
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model import checkpoint as module
from gemma_edge.model import layerwise
from gemma_edge.model.checkpoint import Checkpoint, Shards, norm_names, row_slices, weight_shapes

State = dict[str, Tensor]
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(checkpoint("tiny"), tmp_path / "model"))


@pytest.fixture
def sharded(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """The same model in many files, cut by transformers."""
    hf_model(checkpoint("tiny")).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def stored(folder: Path) -> State:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def edit(folder: Path, change: Callable[[State], object]) -> None:
    state = stored(folder)
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def assert_holds(weights: Checkpoint, state: State) -> None:
    for name in weight_shapes(weights.config):
        assert_close(weights.matrix(name), state[f"{name}.weight"].float(), rtol=0.0, atol=0.0)
    for name in norm_names(weights.config):
        assert_close(weights.vector(name), state[name].float(), rtol=0.0, atol=0.0)


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_are_those_of_the_file(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("odd_sizes")
    weights, state = Checkpoint.open(folder), stored(folder)
    assert set(state) == {f"{name}.weight" for name in weight_shapes(weights.config)} | set(norm_names(weights.config))
    assert sum(value.numel() for value in state.values()) == weights.config.num_parameters
    assert_holds(weights, state)


def test_many_shards_are_read_like_one(sharded: Path, checkpoint: Callable[..., Path]) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 4
    assert_holds(Checkpoint.open(sharded), stored(checkpoint("tiny")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_stored_float_type_is_read_exactly(dtype: torch.dtype, folder: Path) -> None:
    edit(folder, lambda state: state.update({name: value.to(dtype) for name, value in state.items()}))
    weights, state = Checkpoint.open(folder), stored(folder)
    assert state[Q_PROJ].dtype == dtype
    assert weights.dtype(Q_PROJ.removesuffix(".weight")) == dtype
    assert weights.matrix("model.embed_tokens").dtype == torch.float32
    assert_holds(weights, state)


def test_whole_model_and_single_layers_hold_the_file(checkpoint: Callable[..., Path]) -> None:
    weights, state = Checkpoint.open(checkpoint("tiny")), stored(checkpoint("tiny"))
    found = {name: value for name, value in weights.load().state_dict().items() if name != "model.inv_freq"}
    for layer in range(weights.config.num_hidden_layers):
        block = weights.load_layer(layer).state_dict()
        assert {f"model.layers.{layer}.{name}" for name in block} <= set(state)
        found |= {f"layer {layer} {name}": value for name, value in block.items()}
        state |= {f"layer {layer} {name}": state[f"model.layers.{layer}.{name}"] for name in block}
    assert set(found) == set(state)
    for name, value in state.items():
        assert_close(found[name], value, rtol=0.0, atol=0.0)


def test_rows_are_a_slice_in_memory_of_their_own(folder: Path) -> None:
    """A file that stays mapped counts as memory of the process as soon as its pages are touched."""
    path = folder / "model.safetensors"
    whole = stored(folder)[Q_PROJ].clone()
    found = Shards(folder).rows(Q_PROJ, 5, 9)
    assert found.untyped_storage().nbytes() == 4 * whole.shape[1] * 4  # rows, columns, bytes of float32
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # in place: a mapping would see the zeros
    assert_close(found, whole[5:9], rtol=0.0, atol=0.0)


def test_row_slices_cover_every_row_once_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", 1000)
    for rows, columns in [(1, 1), (7, 50), (100, 3), (5, 10_000)]:
        slices = list(row_slices((rows, columns)))
        assert [row for start, stop in slices for row in range(start, stop)] == list(range(rows))
        assert max(stop - start for start, stop in slices) <= max(1, 1000 // (4 * columns))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_data(folder: Path) -> None:
    truncate(folder / "model.safetensors", -100)


def cut_header(folder: Path) -> None:
    truncate(folder / "model.safetensors", 50)


def empty_file(folder: Path) -> None:
    truncate(folder / "model.safetensors", 0)


def web_page(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>Access denied</html>" * 100)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda state: state.pop(name))


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda state: state.update({name: value}))


NORM = "model.layers.1.post_feedforward_layernorm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (no_weights, "has no model.safetensors; pass a Hugging Face model folder"),
    "pickle only": (pickle_only, "pytorch_model.bin, a pickle file"),
    "data cut off": (cut_data, r"model\.safetensors is damaged or truncated"),
    "header cut off": (cut_header, r"model\.safetensors is damaged or truncated"),
    "empty file": (empty_file, r"model\.safetensors is damaged or truncated"),
    "a web page": (web_page, r"model\.safetensors is damaged or truncated"),
    "missing matrix": (drop(Q_PROJ), f"tensor {Q_PROJ} is missing"),
    "missing table": (drop("model.embed_tokens.weight"), r"tensor model\.embed_tokens\.weight is missing"),
    "missing norm": (drop(NORM), f"tensor {NORM} is missing"),
    "transposed": (
        put(Q_PROJ, torch.ones(64, 128)),
        Q_PROJ + r" has shape \[64, 128\], config.json asks for \[128, 64\]",
    ),
    "flat": (put(Q_PROJ, torch.ones(64 * 128)), Q_PROJ + r" has shape \[8192\], config.json asks for \[128, 64\]"),
    "long norm": (put(NORM, torch.ones(65)), NORM + r" has shape \[65\], config.json asks for \[64\]"),
    "double": (put(Q_PROJ, torch.ones(128, 64).double()), Q_PROJ + " is F64; supported: BF16, F16, F32"),
    "integers": (put(Q_PROJ, torch.ones(128, 64).to(torch.int8)), Q_PROJ + " is I8; supported: BF16, F16, F32"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_when_the_folder_is_opened(damage: Callable[[Path], None], words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert re.search(words, message(caught)) and str(folder) in message(caught)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere has no config\.json"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError) as caught:
        Checkpoint.open(sharded)
    assert f"shard {lost.name} named by model.safetensors.index.json is missing" in message(caught)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    damaged = sorted(sharded.glob("*.safetensors"))[2]
    truncate(damaged, -1)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(sharded)
    assert f"{damaged} is damaged or truncated" in message(caught)


def test_an_index_cannot_point_outside_its_folder(sharded: Path, checkpoint: Callable[..., Path]) -> None:
    index = sharded / "model.safetensors.index.json"
    other = checkpoint("tiny") / "model.safetensors"
    index.write_text(json.dumps({"weight_map": {Q_PROJ: str(other)}}))
    with pytest.raises(InputError, match="is missing"):
        Checkpoint.open(sharded)


BROKEN_INDEX = {
    "not JSON": ("{", "is not valid JSON"),
    "empty": ("", "is not valid JSON"),
    "no map": ("{}", "is damaged"),
    "map is a list": ('{"weight_map": ["model-00001-of-00002.safetensors"]}', "is damaged"),
    "list": ("[]", "does not hold a JSON object"),
    "files are numbers": ('{"weight_map": {"a": 1}}', "is damaged"),
}


@pytest.mark.parametrize(("text", "problem"), BROKEN_INDEX.values(), ids=BROKEN_INDEX.keys())
def test_a_broken_index_is_named(text: str, problem: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(sharded)
    assert f"{sharded / 'model.safetensors.index.json'} {problem}" in message(caught)


BAD_VALUES = {
    "NaN": [float("nan")],
    "infinity": [float("inf")],
    "minus infinity": [float("-inf")],
    "infinities that cancel": [float("inf"), float("-inf")],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES.keys())
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", NORM])
def test_a_weight_that_is_not_finite_is_named_when_read(
    name: str, values: list[float], dtype: torch.dtype, folder: Path
) -> None:
    def poison(state: State) -> None:
        state[name] = state[name].to(dtype)
        state[name].view(-1)[-len(values) :] = torch.tensor(values)  # the very last ones

    edit(folder, poison)
    weights = Checkpoint.open(folder)
    with pytest.raises(InputError) as caught:
        weights.load()
    assert f"tensor {name} holds NaN or infinite values" in message(caught)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_weights_whose_sum_overflows_are_finite(dtype: torch.dtype, folder: Path) -> None:
    huge = torch.full((128, 64), 3e38).to(dtype)
    put(Q_PROJ, huge)(folder)
    assert_close(Checkpoint.open(folder).matrix(Q_PROJ.removesuffix(".weight")), huge.float(), rtol=0.0, atol=0.0)


def test_a_head_stored_as_a_copy_of_the_table_is_no_obstacle(tmp_path: Path) -> None:
    """Some tools save a tied head as a tensor of its own."""
    folder = make_checkpoint(tmp_path)
    state = stored(folder)
    edit(folder, lambda s: s.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert_holds(Checkpoint.open(folder), state)


@pytest.mark.parametrize("announced", [True, False])
def test_a_head_that_differs_from_the_table_is_a_matrix_of_its_own(announced: bool, tmp_path: Path) -> None:
    """transformers unties them then, whatever config.json says: a merge or a fine-tuning of the head can leave such a folder."""
    folder = make_checkpoint(tmp_path)
    edit(folder, lambda s: s.update({HEAD: s["model.embed_tokens.weight"].flip(0).contiguous()}))
    set_tied(folder, announced)
    weights, hf = Checkpoint.open(folder), hf_model(folder)
    assert not weights.config.tie_word_embeddings
    assert weights.config.num_parameters == sum(value.numel() for value in stored(folder).values())
    assert_close(weights.matrix("lm_head"), hf.lm_head.weight.data, rtol=0.0, atol=0.0)
    ids = torch.arange(3, 27)
    expected = hf_logits(hf, ids)
    hidden = layerwise.hidden_states(weights, ids, len(ids))
    assert relative_error(layerwise.logits(weights, hidden), expected) <= 1e-5


def test_an_announced_head_that_equals_the_table_is_tied(tmp_path: Path) -> None:
    """Trainers save a tied head like this. Nothing is stored or computed twice."""
    folder = make_checkpoint(tmp_path)
    edit(folder, lambda s: s.update({HEAD: s["model.embed_tokens.weight"].clone()}))
    set_tied(folder, tied=False)
    assert Checkpoint.open(folder).config.tie_word_embeddings


def test_an_announced_head_that_is_not_stored_is_refused(folder: Path) -> None:
    """transformers would compute with a random head."""
    set_tied(folder, tied=False)
    with pytest.raises(InputError, match=r"tie_word_embeddings is false, but .* no lm_head\.weight") as error:
        Checkpoint.open(folder)
    assert "set it to true" in message(error)


def test_a_head_of_another_size_than_the_table_is_refused(folder: Path) -> None:
    edit(folder, lambda s: s.update({HEAD: torch.zeros(321, 64)}))
    with pytest.raises(InputError, match=r"lm_head\.weight has shape \[321, 64\]"):
        Checkpoint.open(folder)


def test_the_configuration_is_looked_at_before_the_weights(tmp_path: Path) -> None:
    """The error names the other model, even if its weights are of a kind that is not read."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="model_type"):
        Checkpoint.open(tmp_path)


def set_tied(folder: Path, tied: bool) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))


def test_names_without_the_prefix_are_those_of_the_model(folder: Path) -> None:
    """Saved from Gemma2Model alone, or by a trainer's save_model; transformers completes the names too."""
    state = stored(folder)
    save_file({name.removeprefix("model."): value for name, value in state.items()}, folder / "model.safetensors")
    assert_close(hf_model(folder).state_dict()[Q_PROJ], state[Q_PROJ], rtol=0.0, atol=0.0)
    assert_holds(Checkpoint.open(folder), state)


def test_shards_may_lie_in_a_folder_below(sharded: Path, checkpoint: Callable[..., Path]) -> None:
    index = sharded / "model.safetensors.index.json"
    (sharded / "weights").mkdir()
    for path in sharded.glob("*.safetensors"):
        path.rename(sharded / "weights" / path.name)
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {key: f"weights/{name}" for key, name in names.items()}}))
    assert_holds(Checkpoint.open(sharded), stored(checkpoint("tiny")))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "score.weight", "model.vision.weight"])
def test_a_tensor_that_the_model_would_lack_is_named(name: str, folder: Path) -> None:
    """transformers ignores such a tensor with a warning, and computes another model than the one that was trained."""
    edit(folder, lambda state: state.update({name: torch.zeros(64)}))
    with pytest.raises(InputError) as caught:
        Checkpoint.open(folder)
    assert f"holds {name}, which Gemma2ForCausalLM does not have; " in message(caught)


def test_tables_of_angles_that_old_folders_hold_are_not_missed(folder: Path) -> None:
    state = stored(folder)
    edit(folder, lambda more: more.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    assert_holds(Checkpoint.open(folder), state)
