"""`quantize` makes a quantized checkpoint alone: the same integers as an export, complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import DEMO, make_checkpoint

from gemma_edge.bundle.codec import convert
from gemma_edge.bundle.entries import CalibrationEntry
from gemma_edge.errors import InputError
from gemma_edge.export.api import Export
from gemma_edge.model.checkpoint import TABLE, Checkpoint, weight_shapes
from gemma_edge.quantize import api
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.quantize.recipe import INT8_ROW, QuantConfig

FAST = QuantizeOptions(bits=8)
DEAD = 4_194_304  # one more than the largest process id


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("float"))


def test_every_file_is_that_of_an_export_with_save_checkpoint(demo: Export, tmp_path: Path) -> None:
    result = api.quantize(DEMO, tmp_path / "out")
    assert contents(result.path) == contents(demo.bundle.parent / "checkpoint")
    assert result.recipe.name == demo.manifest.recipe.name == "int4-g128"
    assert convert(dict(result.calibration), CalibrationEntry) == demo.manifest.recipe.calibration
    assert [stage.name for stage in result.stages] == ["calibrate", "quantize"]
    assert result.configs[TABLE] == INT8_ROW and set(result.configs) == set(weight_shapes(Checkpoint.open(DEMO).config))


def test_result_is_a_checkpoint_that_is_quantized_no_further(model: Path, tmp_path: Path) -> None:
    first = api.quantize(str(model), tmp_path / "first", QuantizeOptions(quality="fast"))
    assert QuantizedCheckpoint.open(first.path).configs == first.configs and first.calibration == {}
    assert first.configs["model.layers.0.mlp.up_proj"] == QuantConfig(4, 32)
    again = api.quantize(first.path, tmp_path / "deep" / "again", QuantizeOptions(bits=8))
    assert again.configs == first.configs and again.recipe.name == "int4-g32"
    for name, data in contents(first.path).items():
        assert name.endswith(".json") or contents(again.path)[name] == data


def test_nothing_is_replaced_without_force_and_only_quantized_checkpoints_with_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = contents(api.quantize(model, out, FAST).path)
    with pytest.raises(InputError, match="out exists"):
        api.quantize(model, out, QuantizeOptions(quality="fast"))
    assert contents(out) == before
    api.quantize(model, out, QuantizeOptions(quality="fast"), force=True)
    assert contents(out) != before and [path.name for path in tmp_path.iterdir()] == ["out"]
    other = make_checkpoint(tmp_path / "other")
    kept = contents(other)
    with pytest.raises(InputError, match="other exists and is not a quantized checkpoint"):
        api.quantize(model, other, FAST, force=True)
    assert contents(other) == kept


def test_a_checkpoint_does_not_replace_itself(model: Path, tmp_path: Path) -> None:
    out = api.quantize(model, tmp_path / "out", FAST).path
    before = contents(out)
    with pytest.raises(InputError, match="is the model itself"):
        api.quantize(out, out, FAST, force=True)
    assert contents(out) == before


def test_what_fails_leaves_nothing_and_what_was_killed_is_removed_by_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(api, "write_quantized", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            api.quantize(model, tmp_path / "out", FAST)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / f".out.partial-{DEAD}" / "checkpoint"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    beside = tmp_path / f".out.partial-{os.getppid()}"  # of a process that is still there, and holds its lock
    beside.mkdir()
    lock = os.open(beside, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    api.quantize(model, tmp_path / "out", FAST)
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == {"out", beside.name}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (QuantizeOptions(bits=5), "^bits 5; supported: 4, 8, 16, 32"),
        (QuantizeOptions(quality="utter"), "^quality utter; supported: fast, balanced, best"),
        (QuantizeOptions(size="5MB"), "^size limits the weights file of a bundle.*pass bpw"),
        (QuantizeOptions(bpw=5.0, group_size=32), "^bpw decides the integers of every weight: group_size cannot"),
        (QuantizeOptions(bits=8, quality="best"), "^quality best uses calibration text.*pass method gptq"),
        (QuantizeOptions(bits=8, calibration_text=CalibrationText(tokens=512)), "leave out calibration_text"),
        (QuantizeOptions(bits=16, distill=512), "^distill trains scales"),
    ],
)
def test_options_that_cannot_be_used_are_named_as_the_library_names_them(
    options: QuantizeOptions, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        api.quantize(DEMO, tmp_path / "out", options)
    assert caught.value.field is not None and list(tmp_path.iterdir()) == []


def test_a_lora_is_merged_first_and_not_into_integers(model: Path, tmp_path: Path) -> None:
    given = api.quantize(model, tmp_path / "given", FAST).path
    with pytest.raises(InputError, match="a LoRA can only be merged into float weights") as caught:
        api.quantize(given, tmp_path / "out", lora=tmp_path)
    assert caught.value.field == "lora"
    with pytest.raises(InputError, match=r"has no adapter_config\.json; lora takes a PEFT adapter folder"):
        api.quantize(model, tmp_path / "out", FAST, lora=tmp_path)


def test_weights_say_what_is_stored(model: Path, tmp_path: Path) -> None:
    source, linear = Checkpoint.open(model), "model.layers.0.mlp.up_proj"
    assert not source.is_quantized and source.kv_scales is None and set(source.configs.values()) == {None}
    assert torch.equal(source.plain_rows(linear, 0, 8), source.rows(linear, 0, 8))
    for read in (lambda: source.quantized(linear, 0, 8), lambda: source.scale_dtype(linear)):
        with pytest.raises(RuntimeError, match=rf"{linear} is float"):
            read()
    quantized = QuantizedCheckpoint.open(api.quantize(model, tmp_path / "out", FAST).path)
    assert quantized.is_quantized and quantized.configs[linear] == INT8_ROW
    # the table lies there in float too
    assert torch.equal(quantized.plain_rows(TABLE, 0, 8), source.rows(TABLE, 0, 8))
    assert not torch.equal(quantized.rows(TABLE, 0, 8), source.rows(TABLE, 0, 8))
    assert {path.name for path in quantized.files()} == {path.name for path in quantized.folder.glob("*.safetensors")}


def test_options_are_listed_without_torch() -> None:
    lines = "import sys, gemma_edge.quantize.options, gemma_edge.quantize.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lines]).returncode == 0


def test_a_file_that_could_not_be_copied_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's `quantize` noticed it only when it copied the file, after the calibration."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (tmp_path / "secret").write_text("key")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(api, "make_checkpoint", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(InputError, match="outside of the model's folder"):
        api.quantize(folder, tmp_path / "out", FAST)
    assert not (tmp_path / "out").exists()
