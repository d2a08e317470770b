"""`gemma-bench` as a user types it: tables, JSON, CSV, and every refusal."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.browsing.browser import look_at, needs_browser
from support.toys import edit_json, write_toy_bundle

from gemma_edge.bench.cli import main

FEW = ("-p", "3", "-n", "2", "-r", "2", "-t", "1")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("bench") / "toy")


@pytest.fixture(scope="module")
def saved(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "toy.json"
    done = run(toy, *FEW, "--save", path)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "speed: backend onnx, t 1, p 3, n 2" in shown and "prefill, tok/s" in shown and "peak, MiB" in shown
    return path


def test_saved_results_are_shown_again_as_csv_json_and_beside_new_ones(saved: Path, toy: Path) -> None:
    document = json.loads(saved.read_text())
    assert json.loads(run("--from", saved, "--json").stdout) == document
    (line,) = csv.DictReader(io.StringIO(run("--from", saved, "--csv").stdout))
    (result,) = document["results"]
    assert (line["model"], line["backend"], line["prefill"], line["repetitions"]) == ("toy", "onnx", "3", "2")
    assert float(line["rss_peak_mib"]) == pytest.approx(result["memory"]["peak_mib"], rel=1e-4)
    assert line["failure"] == ""
    both = json.loads(run(toy, *FEW, "--from", saved, "--json").stdout)["results"]
    assert both[0] == result and len(both) == 2


def test_one_that_fails_is_named_beside_those_that_do_not(toy: Path, tmp_path: Path) -> None:
    """A damaged graph: the line of the runtime, exit 1, and the other bundle's figures."""
    broken = write_toy_bundle(tmp_path / "broken")
    graph = broken / "generate.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    done = run(broken, toy, *FEW)
    assert done.exit_code == 1
    assert "broken (onnx, 1 threads, prompt 3) failed:" in done.stdout and "generate.onnx was changed" in done.stdout
    assert "toy" in done.stdout and "prefill, tok/s" in done.stdout and "Traceback" not in done.output


@needs_browser
def test_the_page_is_seen_in_a_browser(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    page = tmp_path / "page.html"
    assert run("--from", saved, "--html", page).exit_code == 0
    found = look_at(page, tmp_path)
    assert (found["console"], found["fetched"], found["scrolls"]) == ([], [], False)
    # prefill, decode, roofline, by position, latencies, memory
    assert len(found["plots"]) == 6
    for plot in found["plots"]:
        assert plot["within"] and plot["width"] > 400 and plot["height"] > 60 and plot["drawn"] > 10, plot
    assert all(any("toy" in text for text in plot["text"]) for plot in found["plots"])


@needs_browser
def test_what_a_page_should_not_do_is_noticed(tmp_path: Path) -> None:
    """The check itself: an error on the console, something fetched, a drawing that nobody can see."""
    page = tmp_path / "page.html"
    page.write_text(
        "<body><script>console.error('bad')</script><img src='none.png'>"
        "<svg width='9' height='9' style='position:absolute; left:-50px'><path d='M0 0 L5 5'/></svg></body>"
    )
    found = look_at(page, tmp_path)
    assert found["console"] and found["fetched"] and not found["plots"][0]["within"] and not found["plots"][0]["drawn"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["nothing to measure", "--from FILE"]),
        (["{toy}", "-p", "1,x"], ["--prefill 1,x", "integers, comma-separated"]),
        (["{toy}", "-p", "0"], ["--prefill 0", "at least one token"]),
        (["{toy}", "-n", "0"], ["--decode 0"]),
        (["{toy}", "-r", "0"], ["--repeat 0", "at least one repetition"]),
        (["{toy}", "-t", "1000"], ["--threads 1000", "cores only wait for each other"]),
        (["{toy}", "--minutes", "-1"], ["--minutes -1"]),
        (["{toy}", "--rounds", "0"], ["--rounds 0"]),
        (["{toy}", "--backend", "tflite"], ["holds no 'tflite' backend"]),
        (["{toy}", "--json", "--csv"], ["--json and --csv"]),
        (["{toy}", "--save", "{tmp}/no/a.json"], ["--save", "in a folder that exists"]),
        (["{toy}", "--html", "{tmp}"], ["--html", "no file can be written there"]),
        (["{tmp}"], ["is not a bundle"]),
        (["--peer", "genai"], ["--peer genai needs a model", "genai:FOLDER"]),
        (["--from", "{tmp}/none.json"], ["has no none.json", "gemma-bench has saved"]),
        (["--from", "{toy}/tokenizer.json"], ["tokenizer.json holds no results"]),
    ],
)
def test_what_cannot_be_measured_is_refused(args: list[str], parts: list[str], toy: Path, tmp_path: Path) -> None:
    done = run(*(arg.format(toy=toy, tmp=tmp_path) for arg in args))
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and done.stdout == ""
    for part in parts:
        assert part in line, line
    assert list(tmp_path.iterdir()) == []


# what is typed for each parameter
TYPED = {
    "bundles": ["BUNDLE"], "prefill": ["-p", "8"], "decode": ["-n", "8"], "repeat": ["-r", "2"], "warmup": ["-w", "0"],
    "threads": ["-t", "1"], "minutes": ["--minutes", "1"], "rounds": ["--rounds", "2"], "backend": ["--backend", "onnx"],
    "accelerator": ["--accelerator", "gpu"], "peers": ["--peer", "genai:MODEL"],
    "device": ["--device", "adb"], "all_devices": ["--all-devices"],
    "timeout": ["--timeout", "9"], "keep": ["--keep"], "saved": ["--from", "FILE"], "compare": ["--compare", "A", "B"],
    "save": ["--save", "OUT"], "html": ["--html", "PAGE"], "as_json": ["--json"], "as_csv": ["--csv"],
}  # fmt: skip
MEASURING = "prefill decode repeat warmup threads minutes rounds"
# the parameters that choose a mode -> the others that have no effect in it
UNUSED = {
    (
        "compare",
    ): f"bundles {MEASURING} backend accelerator peers device all_devices timeout keep saved save html as_csv",
    ("saved",): f"{MEASURING} backend accelerator timeout keep",
    ("peers",): "backend accelerator timeout keep",
    ("bundles",): "timeout keep",
    ("bundles", "device"): "accelerator",
    ("bundles", "all_devices"): "accelerator",
}


def test_every_parameter_is_in_the_table() -> None:
    assert set(TYPED) == {option.name for option in main.params} - {"version"}


@pytest.mark.parametrize("chosen", UNUSED, ids=" ".join)
def test_what_has_no_effect_in_a_mode_is_refused_and_nothing_else(
    chosen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was ignored without a word: --compare took any option, --from took --minutes, a bundle took --keep."""
    monkeypatch.chdir(tmp_path)
    for name, words in TYPED.items():
        args = [*words, *(word for other in chosen for word in TYPED[other])]
        if name in UNUSED[chosen].split():
            done = run(*args)
            assert done.exit_code == 2 and done.stdout == "", args
            (line,) = done.stderr.splitlines()
            option = next(option for option in main.params if option.name == name)
            spelling = "BUNDLE..." if name == "bundles" else max(option.opts, key=len)
            assert line.startswith(f"error: {spelling} has no effect ") and line.endswith("; leave it out")
        elif not any(name in other for other in UNUSED):  # those choose another mode
            assert "has no effect" not in run_stubbed(args, monkeypatch), args
    assert {path.name for path in tmp_path.iterdir()} <= {"OUT", "PAGE"}


def run_stubbed(args: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command says when measuring, comparing and loading give nothing."""
    with monkeypatch.context() as patch:
        patch.setattr("gemma_edge.bench.cli._run", lambda choices: [])
        patch.setattr("gemma_edge.bench.cli._compare", lambda *files, as_json: None)
        patch.setattr("gemma_edge.bench.result.load", lambda paths: [])
        patch.setattr("gemma_edge.bench.cli.Output.show", lambda output, results: None)
        done = run(*args)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.stderr


def test_a_backend_that_is_not_installed_is_left_out_with_a_note(toy: Path, tmp_path: Path) -> None:
    """In a process that cannot find it, as on a machine without the extra."""
    other = write_toy_bundle(tmp_path / "both")
    manifest = json.loads((other / "manifest.json").read_text())
    settings = {
        "program": "generate.onnx",
        "methods": {"generate": "generate", "score": "score"},
        "min_executorch": "1.5",
    }
    executorch = {**manifest["backends"]["onnx"], "settings": settings}
    edit_json(other / "manifest.json", backends={**manifest["backends"], "executorch": executorch})
    code = (
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'executorch' else find(name)\n"
        "from gemma_edge.bench.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, other, *FEW, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "executorch is not installed and left out; pip install 'gemma-edge[executorch]'" in done.stderr
    assert [result["model"]["backend"] for result in json.loads(done.stdout)["results"]] == ["onnx"]


def test_help_and_saved_results_load_no_runtime(saved: Path) -> None:
    for args in (["--help"], ["--from", str(saved)]):
        code = (
            "import sys\nfrom gemma_edge.bench.cli import main\n"
            f"main({args!r}, standalone_mode=False)\n"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'matplotlib'} & set(sys.modules)\n"
            "sys.exit(f'imported: {heavy}' if heavy else 0)"
        )
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "COLUMNS": "80"}
        )
