"""The pass over a checkpoint: what it leaves is read by transformers, and however it ends, the next run goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import ROOT, hf_holding, hf_logits, hf_model, hf_quantized, make_checkpoint
from support.kv8 import kv_ranges
from torch import Tensor
from torch.testing import assert_close

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import TABLE, Checkpoint, norm_names, weight_shapes
from gemma_edge.quantize.calibration import layerwise
from gemma_edge.quantize.calibration.layerwise import (
    STATE,
    Calibration,
    calibrate,
    folder_bytes,
    key_of,
    layer_file,
    missing_bytes,
    only_here,
)
from gemma_edge.quantize.calibration.windows import advance, runner
from gemma_edge.quantize.checkpoint.kv_scales import KVRanges
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint, open_weights
from gemma_edge.quantize.checkpoint.writer import Fitted, shard_names, write_quantized
from gemma_edge.quantize.recipe import ANY, TABLE_PATTERN, QuantConfig, QuantRule, Recipe, make_recipe

LAYERS = 4
GPTQ, BEST = make_recipe(4, quality="balanced"), make_recipe(4, quality="best")
MIXED = Recipe(
    "mixed",
    (
        QuantRule(TABLE_PATTERN, None),
        QuantRule(r".*\.v_proj", None),  # float, and yet a fold divides its rows
        QuantRule(r".*\.q_proj", QuantConfig(8, 0), "rtn"),
        QuantRule(r"model\.layers\.1\..*", QuantConfig(4, 0), "hscale"),
        QuantRule(r".*\.(o|down)_proj", QuantConfig(4, 32), "awq"),
        QuantRule(ANY, QuantConfig(4, 64), "awq+gptq"),
    ),
)


def text(seed: int = 0, windows: int = 12, tokens: int = 24) -> Tensor:
    ids = torch.randint(3, 320, (windows, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    return ids


SEEN = Calibration(text(), rounds=1, refit=True)


def run(source: Checkpoint, recipe: Recipe, seen: Calibration, folder: Path, **options: Any) -> list[layerwise.Report]:
    folder.mkdir(exist_ok=True)
    reports, _ = calibrate(source, recipe, seen, folder, **options)
    return reports


def finished(folder: Path) -> dict[str, bytes]:
    assert not list(folder.glob("*partial*"))
    return {path.name: path.read_bytes() for path in sorted(folder.glob("layer-*"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    # gentler weights than the other tests': with deviation 1 the softmaxes are so hard that rounding changes everything
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("layerwise"), initializer_range=0.1))


@pytest.fixture(scope="module")
def whole(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pass that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(source, BEST, SEEN, folder)
    found = finished(folder)
    assert len(found) == LAYERS
    return found


# What it leaves


def written(source: Checkpoint, recipe: Recipe, seen: Calibration, folder: Path) -> QuantizedCheckpoint:
    run(source, recipe, seen, folder / "layers")
    return write_quantized(
        source, recipe, folder / "out", fitted=Fitted(lambda layer: layer_file(folder / "layers", layer))
    )


@pytest.mark.parametrize("shape", ["tiny", "heads_like_27b", "odd_sizes", "gemma3_scaled", "gemma1_one_head"])
@pytest.mark.parametrize("recipe", [GPTQ, BEST, MIXED], ids=lambda recipe: recipe.rules[-1].method + recipe.name)
def test_transformers_computes_the_same_logits_from_the_folder(
    recipe: Recipe, shape: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = checkpoint(shape)
    weights = written(Checkpoint.open(original), recipe, SEEN, tmp_path)
    state = {f"{name}.weight": weights.matrix(name) for name in weight_shapes(weights.config) if name != TABLE}
    state |= {name: weights.vector(name) for name in norm_names(weights.config)}
    state[f"{TABLE}.weight"] = weights.plain_rows(TABLE, 0, 320)
    ids = text(seed=1)[0]
    ours = hf_logits(hf_holding(original, state), ids)
    assert_close(hf_logits(hf_quantized(weights.folder), ids), ours, rtol=0.0, atol=0.0)  # the same weights, same code
    if recipe.folds:
        norm = f"model.layers.0.{weights.config.norms.before_mlp}.weight"
        assert not torch.equal(weights.vector(norm), Checkpoint.open(original).vector(norm))


def test_the_next_layer_was_fitted_to_what_the_checkpoint_computes(source: Checkpoint, tmp_path: Path) -> None:
    """The pass's own activations against transformers': folds, integers and norms as they lie on disk, every window alike.

    And what it reports of them: gemma-eval's mean over positions was compared with one norm over all of them.
    """
    recipe = Recipe("float table", (QuantRule(TABLE_PATTERN, None), *BEST.rules[1:]))
    with pytest.raises(Stop):
        run(source, recipe, SEEN, tmp_path / "layers", progress=stopped_after(LAYERS - 1))
    streams = load_file(tmp_path / "layers" / STATE)
    reports = run(source, recipe, SEEN, tmp_path / "layers")
    weights = write_quantized(
        source, recipe, tmp_path / "out", fitted=Fitted(lambda layer: layer_file(tmp_path / "layers", layer))
    )
    after: dict[str, list[Tensor]] = {}  # every block, (N, T, hidden)
    for name, model in (("quantized", hf_quantized(weights.folder)), ("original", hf_model(source.folder))):
        seen: list[list[Tensor]] = [[] for _ in range(LAYERS)]
        for layer, outputs in enumerate(seen):
            model.model.layers[layer].register_forward_hook(lambda module, args, out, to=outputs: to.append(out))
        for window in SEEN.windows:
            hf_logits(model, window)
        after[name] = [torch.cat(outputs) for outputs in seen]
        # a product in another order is off by 2^-24 of its terms, and there are some hundreds in a row
        assert_close(after[name][LAYERS - 2], streams[name], rtol=1e-4, atol=1e-4)
    for report, x, y in zip(reports, after["quantized"], after["original"], strict=True):
        assert report.relative_error == pytest.approx(float(((x - y).norm(dim=-1) / y.norm(dim=-1)).mean()), rel=1e-3)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_scales_of_an_int8_cache_cover_the_keys_and_values_of_transformers(model_type: str, tmp_path: Path) -> None:
    """Keys as the cache holds them: normalised where the family does that, and rotated."""
    folder = make_checkpoint(tmp_path / "model", model_type=model_type, num_hidden_layers=6, initializer_range=0.1)
    source, recipe = Checkpoint.open(folder), Recipe("float table", (QuantRule(TABLE_PATTERN, None), *GPTQ.rules[1:]))
    (tmp_path / "layers").mkdir()
    _, found = calibrate(source, recipe, SEEN, tmp_path / "layers")
    weights = write_quantized(
        source, recipe, tmp_path / "out", fitted=Fitted(lambda i: layer_file(tmp_path / "layers", i))
    )
    model, ranges = hf_quantized(weights.folder), KVRanges()
    for window in SEEN.windows:
        for layer, (k, v) in kv_ranges(model, window).largest.items():
            ranges.add(layer, k[None, :, None], v[None, :, None])
    assert len(found) == 6
    for layer, expected in ranges.scales().items():
        assert_close(found[layer], expected, rtol=1e-3, atol=1e-6)  # twelve windows in another order of additions


@pytest.mark.parametrize("float_bits", [16, 32])
def test_a_linear_left_float_keeps_the_type_of_the_source(float_bits: int, source: Checkpoint, tmp_path: Path) -> None:
    """It became float32 beside calibrated ones, twice the bytes; a data-free export kept its type."""
    (tmp_path / "half").mkdir()
    tensors = {name: value.half() for name, value in load_file(source.folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source.folder / "config.json", tmp_path / "half" / "config.json")
    half = Checkpoint.open(tmp_path / "half")
    recipe = replace(MIXED, float_bits=float_bits)
    weights = written(half, recipe, SEEN, tmp_path)
    plain = replace(recipe, rules=tuple(replace(rule, method="rtn") for rule in recipe.rules))
    without_data = write_quantized(half, plain, tmp_path / "plain")
    assert {weights.dtype(f"model.layers.{layer}.self_attn.v_proj") for layer in range(LAYERS)} == {torch.float16}
    sizes = [
        [(folder / name).stat().st_size for name in shard_names(half.config)]
        for folder in (weights.folder, without_data.folder)
    ]
    assert sizes[0] == sizes[1]
    # and what the pass fed to the next layer is what the file says
    with pytest.raises(Stop):
        run(half, recipe, SEEN, tmp_path / "again", progress=stopped_after(1))
    block = weights.load_layer(0)
    x = load_file(tmp_path / "again" / STATE)["quantized"]
    start = half.matrix(TABLE)[SEEN.windows] * half.config.hidden_size**0.5
    advance(block, start, runner(half, 0, SEEN.windows.shape[1]))
    assert_close(start, x, rtol=1e-5, atol=1e-5)


def test_the_folder_goes_in_again_bit_for_bit(source: Checkpoint, tmp_path: Path) -> None:
    first = written(source, BEST, SEEN, tmp_path)
    again = write_quantized(open_weights(first.folder), make_recipe(8), tmp_path / "again")
    for name, config in first.configs.items():
        assert again.configs[name] == config is not None
        pair = [each.quantized(name, 0, weight_shapes(each.config)[name][0]) for each in (again, first)]
        assert_close(pair[0].codes, pair[1].codes, rtol=0.0, atol=0.0)
        assert_close(pair[0].scale, pair[1].scale, rtol=0.0, atol=0.0)
    for name in norm_names(source.config):
        assert_close(again.vector(name), first.vector(name), rtol=0.0, atol=0.0)


def test_reports_say_how_far_the_streams_come_apart(source: Checkpoint, tmp_path: Path) -> None:
    recipes = (make_recipe(8, method="gptq"), BEST, make_recipe(4, group_size=0, method="hscale"))
    ends = [run(source, each, SEEN, tmp_path / str(i)) for i, each in enumerate(recipes)]
    assert [report.layer for report in ends[0]] == list(range(LAYERS))
    fine, grouped, coarse = (reports[-1].relative_error for reports in ends)
    assert 0 < 8 * fine < grouped < coarse < 1


def test_the_table_stays_float_for_the_first_layer_if_the_recipe_leaves_it(source: Checkpoint, tmp_path: Path) -> None:
    float_table = Recipe("float table", (QuantRule(TABLE_PATTERN, None), *GPTQ.rules[1:]))
    run(source, float_table, SEEN, tmp_path / "float")
    run(source, GPTQ, SEEN, tmp_path / "int8")
    assert finished(tmp_path / "float") != finished(tmp_path / "int8")


# However it ends


class Stop(Exception):
    pass


def stopped_after(layers: int) -> Callable[[int], None]:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done >= layers:
            raise Stop

    return progress


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pass_that_was_stopped_goes_on_and_gives_the_same_bytes(
    layers: int, source: Checkpoint, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        run(source, BEST, SEEN, tmp_path, progress=stopped_after(layers))
    assert list(finished(tmp_path)) == list(whole)[:layers]
    missing = missing_bytes(tmp_path, source.config, BEST, SEEN)
    assert sum(map(len, list(whole.values())[layers:])) < missing < folder_bytes(source.config, BEST, SEEN)
    steps: list[int] = []
    reports = run(source, BEST, SEEN, tmp_path, progress=steps.append)
    assert steps == [layers] + [1] * (LAYERS - layers)
    assert [report.layer for report in reports] == list(range(LAYERS))
    assert finished(tmp_path) == whole


def test_a_finished_pass_costs_nothing_the_second_time(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(source, BEST, SEEN, tmp_path)
    # the streams of activations, hundreds of MB of a real model, were kept for a week
    assert (tmp_path / STATE).stat().st_size < 4 * SEEN.windows.numel() * source.config.hidden_size
    assert missing_bytes(tmp_path, source.config, BEST, SEEN) == 0
    monkeypatch.setattr(layerwise, "quantize_block", lambda *args, **kwargs: pytest.fail("a layer was made again"))
    assert run(source, BEST, SEEN, tmp_path) == first


@pytest.mark.parametrize("step", ["_write_layer", "_save"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_between_a_layer_and_its_state_nothing_is_lost(
    step: str, error: Any, source: Checkpoint, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(layerwise, step), iter(range(99))

    def third_time_unlucky(*args: Any) -> None:
        if next(calls) == 2:
            raise error
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, step, third_time_unlucky)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
            run(source, BEST, SEEN, tmp_path)
    steps: list[int] = []
    run(source, BEST, SEEN, tmp_path, progress=steps.append)
    assert steps == [2, 1, 1] and finished(tmp_path) == whole


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = {path!r}
from test_layerwise import BEST, SEEN, Checkpoint, run
done = 0
def progress(count):
    global done
    done += count
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
run(Checkpoint.open(Path(sys.argv[1])), BEST, SEEN, Path(sys.argv[2]), progress=progress)
"""


def test_a_pass_killed_from_outside_goes_on_too(source: Checkpoint, whole: dict[str, bytes], tmp_path: Path) -> None:
    code = KILLED.format(path=[str(Path(__file__).parent), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", code, source.folder, tmp_path])
    assert done.returncode == -signal.SIGKILL
    steps: list[int] = []
    run(source, BEST, SEEN, tmp_path, progress=steps.append)
    assert steps == [2, 1, 1] and finished(tmp_path) == whole


def damages() -> Iterator[Any]:
    for name in (STATE, "layer-000.safetensors", "layer-002.safetensors"):
        yield pytest.param(name, lambda path: path.write_bytes(path.read_bytes()[:-100]), id=f"{name} cut short")
        yield pytest.param(name, lambda path: path.write_bytes(b""), id=f"{name} empty")
        yield pytest.param(name, lambda path: path.unlink(), id=f"{name} gone")
        yield pytest.param(name, lambda path: path.write_bytes(bytes(path.stat().st_size)), id=f"{name} zeros")


@pytest.mark.parametrize(("name", "damage"), damages())
def test_a_damaged_file_is_not_trusted(
    name: str, damage: Callable[[Path], object], source: Checkpoint, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        run(source, BEST, SEEN, tmp_path, progress=stopped_after(3))
    damage(tmp_path / name)
    run(source, BEST, SEEN, tmp_path)
    assert finished(tmp_path) == whole


def test_one_layer_lost_by_a_finished_pass_is_made_again(
    source: Checkpoint, whole: dict[str, bytes], tmp_path: Path
) -> None:
    run(source, BEST, SEEN, tmp_path)
    layer_file(tmp_path, 1).unlink()
    run(source, BEST, SEEN, tmp_path)
    assert finished(tmp_path) == whole


# Whose folder it is


def test_everything_that_matters_is_in_the_key(source: Checkpoint, tmp_path: Path) -> None:
    key = key_of(source, BEST, SEEN)
    assert key == key_of(Checkpoint.open(source.folder), make_recipe(4, quality="best"), Calibration(text(), 1, True))
    other_text = replace(SEEN, windows=text(seed=1))
    other_order = replace(SEEN, windows=text().flip(0))
    other_cut = replace(SEEN, windows=text().view(24, 12))
    keys = [key_of(source, BEST, each) for each in (other_text, other_order, other_cut)]
    keys += [key_of(source, BEST, each) for each in (replace(SEEN, rounds=2), replace(SEEN, refit=False))]
    keys += [key_of(source, each, SEEN) for each in (GPTQ, make_recipe(4, quality="best", group_size=64), MIXED)]
    folder = make_checkpoint(tmp_path / "model", seed=1, initializer_range=0.1)
    keys.append(key_of(Checkpoint.open(folder), BEST, SEEN))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    keys.append(key_of(Checkpoint.open(folder), BEST, SEEN))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys.append(key_of(Checkpoint.open(folder), BEST, SEEN))
    assert len({key, *keys}) == 1 + len(keys)


def test_another_model_of_the_same_size_and_time_is_another_model(source: Checkpoint, tmp_path: Path) -> None:
    """Unpacked from some archives, two fine-tunes differ in nothing but their numbers; one got the other's layers."""
    folder = make_checkpoint(tmp_path / "model", seed=1, initializer_range=0.1)
    found = os.stat(source.folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == found.st_size
    assert key_of(Checkpoint.open(folder), BEST, SEEN) != key_of(source, BEST, SEEN)


def test_a_second_pass_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with only_here(tmp_path / "new"):
        with pytest.raises(InputError, match=rf"another export is calibrating the same model in {tmp_path}"):
            with only_here(tmp_path / "new"):
                pytest.fail("both of them")
    with only_here(tmp_path / "new"):
        pass


def test_activations_that_overflow_are_named_with_their_layer(source: Checkpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", initializer_range=0.1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layer 1: the activations that mlp\.down_proj reads are NaN or infinite"):
        run(Checkpoint.open(folder), GPTQ, SEEN, tmp_path / "layers")
