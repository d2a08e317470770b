"""`gemma-export` as a user types it: good runs, every bad input of the design's table, and being killed at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkpoints import DEMO
from support.commands import COMMAND, refused, run
from support.damage import fill_disk

from gemma_edge.bundle.backends import registered
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.targets import TARGETS
from gemma_edge.quantize.recipe import BITS, METHODS

FAST = ("--quality", "fast")  # where calibration is not what is tested: test_calibration_cli.py does that


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def test_make_is_the_default_command_and_json_holds_bundle_stages_and_gate(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = run(DEMO, "--target", "android", "--bits", "4", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    stages = [stage["name"] for stage in found["stages"]]
    assert found["bundle"] == str(out) and stages == ["calibrate", "quantize", "lower onnx", "hash", "verify"]
    assert found["manifest"]["verification"]["onnx"]["passed"]
    assert "calibrating on 8192 tokens: under a minute; --quality fast needs no text" in result.stderr
    shown = run("inspect", out, "--check-hashes")
    assert shown.exit_code == 0 and "passed the quick gate" in shown.stdout and "mlp.down_proj" in shown.stdout
    assert json.loads(run("inspect", out, "--json").stdout)["schema_version"] == 3
    refused(run(DEMO, "-o", out), f"{out} exists", "--force")
    assert run(DEMO, "-o", out, "--force", "--verify", "none", "--bits", "8").exit_code == 0
    assert Manifest.load(out).recipe.name == "int8-channel"
    assert "NOT VERIFIED" in run("inspect", out).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_plan_predicts_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("plan", DEMO, "--json")
    plan = json.loads(result.stdout)["plans"]["onnx"]
    assert plan["context"] == 512 and plan["weights_bytes"] > 4_500_000 and plan["kv_bytes"] > 0
    table = run("plan", DEMO)
    assert table.exit_code == 0 and str(plan["weights_bytes"]) in table.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--target", "fridge"], ["--target fridge", "android, raspberry-pi, desktop"]),
        (["--bits", "5"], ["--bits 5", "4, 8, 16, 32"]),
        (["--group-size", "48"], ["48", "multiple of 32", "--group-size 64"]),
        (["--bits", "16", "--group-size", "32"], ["--bits 16", "do not apply"]),
        (["--method", "magic"], ["magic", ", ".join(METHODS)]),
        (["--backend", "coreml"], ["coreml", "onnx"]),
        (["--verify", "maybe"], ["maybe", "quick, full, none"]),
        (["--context", "4096"], ["--context 4096", "1 to 512"]),
        (["--context", "0"], ["--context 0", "1 to 512"]),
        (["--prefill-chunk", "0"], ["--prefill-chunk 0"]),
        (["--ram", "0.05"], ["0.05 GiB", "--ram"]),
        (["--lora", "/nowhere"], ["--lora /nowhere", "adapter_config.json", "Hugging Face id"]),
        (["--lora", "a", "--lora", "b"], ["--lora a b", "only one adapter"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_option_is_one_line(args: list[str], parts: list[str], tmp_path: Path) -> None:
    refused(run(DEMO, "-o", tmp_path / "out", *args), *parts)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_are_one_line_and_leave_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weights, config = model / "model.safetensors", model / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    refused(run(tmp_path / "nowhere", "-o", out), "neither a folder nor a Hugging Face model id")
    config.write_text(json.dumps({**json.loads(text), "model_type": "llama"}))
    refused(run(model, "-o", out), "model_type", '"llama"', '"gemma2"')
    config.write_text(text)
    weights.write_bytes(whole[:-1000])
    refused(run(model, "-o", out), "model.safetensors", "truncated")
    weights.unlink()
    refused(run(model, "-o", out), "no model.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"x")
    refused(run(model, "-o", out), "pickle")
    config.unlink()
    refused(run(model, "-o", out), "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("level", ["quick", "none"])
def test_damaged_tokenizer_is_refused_before_any_work(level: str, model: Path, tmp_path: Path) -> None:
    """It was a traceback out of the gate, after all the work."""
    path = model / "tokenizer.json"
    text = path.read_text()
    for damaged in ("", text[:1000], "{}"):
        path.write_text(damaged)
        result = run(model, "-o", tmp_path / "out", "--verify", level)
        refused(result, f"{path} is not a tokenizer", "belongs to the model")
        assert "quantize" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("options", [FAST, ("--calibration-tokens", "256")], ids=lambda options: options[0])
def test_nan_weights_are_named_in_the_middle_of_the_work_and_leave_nothing(
    options: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(run(model, "-o", tmp_path / "out", *options), "model.layers.3.mlp.up_proj.weight", "NaN")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_full_disk_is_one_line_before_the_work_and_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        refused(run(DEMO, "-o", out), "no space for the export", "0.00 GiB are free")
    fill_disk(monkeypatch, "model.onnx.data")
    refused(run(DEMO, "-o", out, *FAST), "no space left")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    refused(run(DEMO, "-o", tmp_path / "photos", "--force"), "is not a bundle")
    assert (tmp_path / "photos" / "cat.jpg").exists()


@pytest.mark.parametrize("kept", ["new/out/checkpoint", "new", "new/out", "new/../new/out/deep/er", "file/checkpoint"])
def test_checkpoint_and_bundle_in_each_other_are_refused_before_any_work(kept: str, tmp_path: Path) -> None:
    """A checkpoint inside OUT was written, and then thrown away with the bundle that was there before."""
    (tmp_path / "file").write_text("x")
    result = run(DEMO, "-o", tmp_path / "new" / "out", "--save-checkpoint", tmp_path / kept, "--force")
    refused(result, "--save-checkpoint", "cannot write in" if kept.startswith("file") else "one would lie in the other")
    assert "quantize" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_checkpoint_is_kept_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "checkpoint"
    assert run(DEMO, "-o", tmp_path / "out", "--save-checkpoint", kept, "--verify", "none", *FAST).exit_code == 0
    assert (kept / "config.json").exists()
    refused(run(DEMO, "-o", tmp_path / "other", "--save-checkpoint", kept), f"{kept} exists")


def test_parents_made_for_a_bundle_that_is_not_made_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    out = tmp_path / "here" / "new" / "dir" / "x"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        refused(run(DEMO, "-o", out), "no space for the export")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    (tmp_path / "file").write_text("x")
    refused(run(DEMO, "-o", tmp_path / "file" / "new" / "x"), "cannot write")
    assert run(DEMO, "-o", out, "--verify", "none", *FAST).exit_code == 0
    assert out.is_dir()


def test_offline_hub_id_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = subprocess.run(
        [*COMMAND, "--target", "android", "--bits", "4"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "cannot fetch google/gemma-2-2b-it" in line and "gemma-export FOLDER" in line


@pytest.mark.parametrize("delay_s", [1.0, 4.0, 6.0, 8.0, 11.0])
def test_kill_9_at_any_moment_leaves_no_half_bundle_and_the_next_run_works(delay_s: float, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(DEMO), "-o", str(out), *FAST]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    if out.exists():  # it was quicker than the delay: then it is whole
        assert Manifest.load(out).verification["onnx"].passed
    assert run(DEMO, "-o", out, "--verify", "none", "--force", *FAST).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Manifest.load(out)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_export_cleans_up_after_itself(signal_number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, str(DEMO), "-o", str(tmp_path / "out"), *FAST],
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job, as a CI may run us, passes on an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("export onnx"):
            break
    process.send_signal(signal_number)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal_number
    assert "Traceback" not in errors and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--help"], ["make", "--help"], ["plan", "--help"], ["inspect", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
from gemma_edge.export.cli import main
try:
    main({args!r})
except SystemExit:
    pass
print(sorted({{"torch", "numpy", "rich", "onnx"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.stderr.strip() == "[]" and "Usage" in done.stdout


def test_help_lists_what_the_code_dispatches_on() -> None:
    """The lists were typed by hand once."""
    text = " ".join(run("make", "--help").stdout.split())
    for names in (TARGETS, registered(), LEVELS, METHODS, BITS):
        assert ", ".join(map(str, names)) in text


def test_without_torch_the_extra_is_named_and_inspect_still_works(tmp_path: Path) -> None:
    """An installation that only runs bundles; the import is blocked, because torch is installed where the tests run."""
    block = "import sys; sys.modules['torch'] = None; import importlib.util as u; real = u.find_spec\n"
    block += "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
    code = block + "from gemma_edge.export.cli import main; main()"
    for command in ([], ["plan"]):
        words = [sys.executable, "-c", code, *command, str(DEMO)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and "gemma-edge[export]" in done.stderr and len(done.stderr.splitlines()) == 1
    assert run(DEMO, "-o", tmp_path / "out", "--verify", "none", *FAST).exit_code == 0
    words = [sys.executable, "-c", code, "inspect", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "NOT VERIFIED" in done.stdout
