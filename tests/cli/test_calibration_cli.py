"""`gemma-export` calibrating, as a user meets it: bad text, a full disk, Ctrl-C, two at once, and what the next run does then."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO
from support.commands import COMMAND, refused, run
from support.damage import fill_disk

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.export.api import open_model
from gemma_edge.export.options import ExportOptions
from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.calibration import cache
from gemma_edge.quantize.calibration.layerwise import key_of, only_here
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions

LAYERS = 6
QUICK = ("--calibration-tokens", "256", "--verify", "none")
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache for each test; what is in it afterwards is only ever whole."""
    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    yield folder / "calibration"
    assert not list(folder.rglob("*.partial"))


def layers(kept: Path) -> dict[str, int]:
    """Finished layers, and when they were."""
    return {path.name: path.stat().st_mtime_ns for path in kept.glob("*/layer-*.safetensors")}


BAD = {
    "empty text": (["--calibration", "empty.txt"], ["0 tokens", "at least 256 are needed"]),
    "tiny text": (["--calibration", "tiny.txt"], ["at least 256 are needed", "--calibration"]),
    "missing": (["--calibration", "nowhere.txt"], ["nowhere.txt does not exist"]),
    "no text": (["--calibration", "folder"], ["folder holds no .txt, .md, .jsonl file"]),
    "bad line": (["--calibration", "bad.jsonl"], ["bad.jsonl:2 is no"]),
    "not UTF-8": (["--calibration", "binary.txt"], ["binary.txt cannot be read as UTF-8 text"]),
    "no such quality": (["--quality", "nope"], ["--quality nope; supported: fast, balanced, best"]),
    "8 bits": (["--bits", "8", "--calibration", "tiny.txt"], ["int8-channel", "leave out --calibration"]),
    "fast": (["--quality", "fast", "--calibration-tokens", "512"], ["int4-g32 without data", "another --quality"]),
}


@pytest.mark.parametrize(("args", "parts"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_calibrated_on_is_one_line_and_leaves_nothing(
    args: list[str], parts: list[str], tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in {
        "empty.txt": b"",
        "tiny.txt": b"Call me Ishmael.",
        "bad.jsonl": b'{"text": "a"}\n{"text": \n',
        "binary.txt": b"\xff\xfe\x00" * 500,
    }.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    refused(run(DEMO, "-o", "out", *args), *parts)
    assert sorted(tmp_path.iterdir()) == before and not kept.exists()


def test_without_a_tokenizer_it_rounds_without_data_and_a_method_with_data_is_refused(tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    refused(run(model, "-o", tmp_path / "out", "--method", "gptq"), "has no tokenizer.json", "pass --method mse")
    refused(run(model, "-o", tmp_path / "out", "--quality", "best"), "has no tokenizer.json")
    result = run(model, "-o", tmp_path / "out", "--verify", "none")
    assert result.exit_code == 0 and "nothing to calibrate on: --quality fast" in result.stderr
    assert Manifest.load(tmp_path / "out").recipe.name == "int4-g32"


def test_a_tokenizer_of_another_model_is_refused_before_the_work(tmp_path: Path, kept: Path) -> None:
    """It was a traceback where the table's rows were looked up."""
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["\u2581the"] = 4096 + vocabulary["\u2581the"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(run(model, "-o", tmp_path / "out", *QUICK), "has the id 4362", "vocabulary of 4096", "belongs to the model")
    assert not kept.exists()


def test_activations_that_overflow_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(run(model, "-o", tmp_path / "out", *QUICK), "layer 2", "mlp.down_proj", "NaN or infinite")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_text_of_another_language_is_warned_of_and_works(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(RUSSIAN * 20)
    result = run(DEMO, "-o", tmp_path / "out", "--calibration", tmp_path / "text.txt", *QUICK)
    assert result.exit_code == 0 and "is spelled in single bytes" in result.stderr
    found = Manifest.load(tmp_path / "out").recipe.calibration
    assert found.text == ("text.txt",) and found.tokens == 256 and len(found.layers) == LAYERS


def test_a_second_target_takes_the_layers_of_the_first(tmp_path: Path, kept: Path) -> None:
    assert run(DEMO, "-o", tmp_path / "android", *QUICK).exit_code == 0
    made = layers(kept)
    assert len(made) == LAYERS
    assert run(DEMO, "-o", tmp_path / "desktop", "--target", "desktop", "--kv-bits", "8", *QUICK).exit_code == 0
    assert layers(kept) == made
    first, second = (Manifest.load(tmp_path / name).files["model.onnx.data"] for name in ("android", "desktop"))
    assert first == second


def test_a_full_disk_of_the_cache_is_told_before_the_work(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, full = shutil.disk_usage(tmp_path), [kept]
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage._replace(free=1000 if any(each in [path, *path.parents] for each in full) else 1 << 40),
    )
    words = [
        "no space for the export",
        str(kept),
        "0.00 GiB are free",
        "set GEMMA_EDGE_CACHE to a folder on another disk",
    ]
    refused(run(DEMO, "-o", tmp_path / "out", *QUICK), *words)
    full[:] = [tmp_path]
    refused(
        run(DEMO, "-o", tmp_path / "out", *QUICK),
        "no space for the export",
        str(tmp_path),
        "pass --out on another disk",
    )
    assert list(tmp_path.iterdir()) == [] and layers(kept) == {}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    refused(run(DEMO, "-o", tmp_path / "out", *QUICK), "no place to keep finished layers", "set GEMMA_EDGE_CACHE")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, ".layer-002.safetensors.partial")
        refused(run(DEMO, "-o", tmp_path / "out", *QUICK), "no space left")
    assert list(tmp_path.iterdir()) == []
    made = layers(kept)
    assert sorted(made) == ["layer-000.safetensors", "layer-001.safetensors"]
    assert run(DEMO, "-o", tmp_path / "out", *QUICK).exit_code == 0
    after = layers(kept)
    assert len(after) == LAYERS and {name: after[name] for name in made} == made


def test_two_at_once_are_refused_in_one_line(tmp_path: Path, kept: Path) -> None:
    opened = open_model(
        ExportOptions(model=str(DEMO), quantization=QuantizeOptions(calibration_text=CalibrationText(tokens=256)))
    )
    assert opened.calibration is not None and isinstance(opened.source, Checkpoint)
    key = key_of(opened.source, opened.recipe, opened.calibration)
    with only_here(cache.calibration_folder(key)):
        refused(
            run(DEMO, "-o", tmp_path / "out", *QUICK), "another export is calibrating the same model", "wait for it"
        )
    assert list(tmp_path.iterdir()) == [] and layers(kept) == {}
    assert run(DEMO, "-o", tmp_path / "out", *QUICK).exit_code == 0


def test_ctrl_c_while_calibrating_exits_130_and_the_next_run_goes_on(tmp_path: Path, kept: Path) -> None:
    out, options = tmp_path / "out", ("--calibration-tokens", "2048", "--verify", "none")
    process = subprocess.Popen(
        [*COMMAND, str(DEMO), "-o", str(out), *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a shell's background job, as a CI may run us, passes on an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not layers(kept) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and errors.strip().endswith("interrupted") and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    made = layers(kept)
    made.pop(max(made))  # it may have been finished without the state that says so
    assert run(DEMO, "-o", out, *options).exit_code == 0
    after = layers(kept)
    assert len(after) == LAYERS and {name: after[name] for name in made} == made
