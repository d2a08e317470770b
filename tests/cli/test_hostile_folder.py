"""The commands, run inside a stranger's model folder: nothing that lies there is executed or read as configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import refused, run
from support.toys import write_toy_bundle

from gemma_edge.bench.adb import find_adb
from gemma_edge.children import child_environment, find_program, python_command

# What our processes and their libraries import, ours first.
MODULES = (
    "gemma_edge", "click", "numpy", "json", "torch", "onnxruntime", "tokenizers", "rich", "matplotlib", "sitecustomize",
    "usercustomize", "random", "subprocess", "tempfile", "executorch", "ai_edge_litert", "flatbuffers", "jinja2", "onnx",
)  # fmt: skip
FEW = ("-p", "3", "-n", "2", "-r", "1", "-t", "1")
RED = "#fe0102"


def fill(folder: Path) -> None:
    """Lay modules, programs and a configuration of matplotlib into a folder; those that run leave a file `ran-NAME`."""
    for name in MODULES:
        marker = str(folder / f"ran-{name}")
        (folder / f"{name}.py").write_text(f"open({marker!r}, 'w').close()\n")
    for name in ("adb", "llama-bench", "python3"):
        program = folder / name
        program.write_text(f"#!/bin/sh\ntouch '{folder}/ran-{name}'\n")
        program.chmod(0o755)
    (folder / "matplotlibrc").write_text(f"axes.labelcolor: {RED[1:]}\n")


def command(name: str, folder: Path, *words: str | Path, path: str = "") -> str:
    """Run a command of ours there, assert that it did its work and nothing ran; its output."""
    environment = {**os.environ, "PATH": f"{path}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    program = Path(sys.executable).with_name(name)
    done = subprocess.run([program, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert [file.name for file in folder.glob("ran-*")] == [], done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_export_runs_nothing_of_the_model_folder(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The gate's process had the current folder first on its sys.path: a click.py in a model folder was executed."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    fill(folder)
    command("gemma-export", folder, ".", "-o", "out", "--bits", "32", "--context", "48", "--backend", "onnx")
    assert (folder / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("words", [("plan",), ("-o", "out")])
def test_a_link_out_of_the_model_folder_is_refused_before_any_work(
    words: tuple[str, ...], checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint(), tmp_path / "model")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "model" / "special_tokens_map.json").symlink_to(tmp_path / "key")
    refused(run(*words, "model"), "special_tokens_map.json is a link to", "outside of the model's folder")
    assert not (tmp_path / "out").exists()


def test_a_benchmark_runs_nothing_of_the_current_folder(tmp_path: Path) -> None:
    """The same, in the process that is measured; the bundle is given by a relative path."""
    fill(tmp_path)
    write_toy_bundle(tmp_path / "toy")
    assert "prefill" in command("gemma-bench", tmp_path, "toy", *FEW, "--csv")


def test_a_page_is_not_drawn_by_the_current_folders_matplotlibrc(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    fill(tmp_path)
    write_toy_bundle(tmp_path / "toy")
    command("gemma-bench", tmp_path, "toy", *FEW, "--html", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and RED not in page


def test_an_evaluation_runs_nothing_of_the_current_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    fill(tmp_path)
    write_toy_bundle(tmp_path / "toy")
    (tmp_path / "text").write_text("5 6 7 8 9 10 11 12")
    command("gemma-eval", tmp_path, "toy", "--text", "text", "--html", "page.html")
    assert RED not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("entry", ["", ".", "programs/.."])
def test_programs_are_not_looked_up_in_the_current_folder(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PATH=:/usr/bin or PATH=.:/usr/bin found the adb of whoever had filled the current folder."""
    fill(tmp_path)
    (tmp_path / "programs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{entry}{os.pathsep}{tmp_path / 'empty'}")
    assert find_program("adb") is None and find_program("llama-bench") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not on the PATH"):
        find_adb()
    monkeypatch.setenv("PATH", f"{entry}{os.pathsep}{tmp_path}")
    assert find_program("adb") == str(tmp_path / "adb")


def test_a_python_of_a_relative_path_means_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert python_command("venv/bin/python", ["-c", ""]) == [str(tmp_path / "venv/bin/python"), "-P", "-c", ""]
    (tmp_path / "python3").touch(mode=0o755)
    monkeypatch.setenv("PATH", os.pathsep)
    assert python_command("python3", []) == ["python3", "-P"]  # left to the system, which finds none


def test_a_childs_environment_keeps_its_meaning_without_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH=:/folder, from PYTHONPATH=$PYTHONPATH:/folder, has an empty entry: Python takes the current folder for it."""
    monkeypatch.chdir(tmp_path)
    given = {"PYTHONPATH": f"{os.pathsep}/folder{os.pathsep}ours", "GEMMA_EDGE_CACHE": "kept", "HOME": "/home/user"}
    assert child_environment(given) == {
        "PYTHONPATH": f"/folder{os.pathsep}{tmp_path / 'ours'}",
        "GEMMA_EDGE_CACHE": str(tmp_path / "kept"),
        "HOME": "/home/user",
        "PYTHONSAFEPATH": "1",
    }
    assert child_environment({"PYTHONPATH": ""}) == {"PYTHONSAFEPATH": "1"}
