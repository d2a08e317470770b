"""`gemma-eval` as a user types it: tables, JSON, the page, lm-eval tasks without a network, and every refusal."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support.checkpoints import DEMO, hf_logits, hf_model
from support.pages import Page
from support.toys import write_toy_bundle
from transformers import AutoTokenizer

from gemma_edge.evaluate.cli import main
from gemma_edge.export.api import Export

COMMAND = [sys.executable, "-c", "from gemma_edge.evaluate.cli import main; main()"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(result: Result, *parts: str) -> None:
    """One line on stderr with these parts, exit 2, nothing on stdout."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and result.stdout == ""
    for part in parts:
        assert part in line, line


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("eval") / "toy")


def test_json_holds_the_protocol_and_one_result_per_model(demo: Export, tmp_path: Path) -> None:
    result = run(demo.bundle, DEMO, "--reference", DEMO, "--max-tokens", "100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["protocol"], found["window"]) == ("hf", 512)
    assert found["texts"] == ["heldout_austen.txt", "heldout_kjv.txt"]
    assert [entry["name"] for entry in found["results"]] == ["bundle", "tiny-gemma2"]
    for entry in found["results"]:
        assert entry["tokens"] == 100 and entry["protocol"] == "hf" and entry["tasks"] == {}
        assert entry["ppl"] > 1 and entry["kl"] >= 0 and 0 < entry["top1"] <= 1
    assert found["reference"]["ppl"] == found["results"][1]["ppl"]
    assert found["results"][0]["size"] == sum(entry.bytes for entry in demo.manifest.files.values())


def test_table_names_protocol_models_and_original(demo: Export) -> None:
    result = run(demo.bundle, "--reference", DEMO, "--max-tokens", "60", "--protocol", "llama.cpp", "--window", "20")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "protocol llama.cpp, windows of 20" in shown
    # two texts of 30 tokens: one window each, of which 9 positions are scored
    assert "18 tokens scored" in shown
    assert "bundle" in shown and "(original)" in shown


def test_two_models_of_one_name_are_shown_by_their_paths(toy: Path, tmp_path: Path) -> None:
    other = write_toy_bundle(tmp_path / "toy")
    found = json.loads(run(toy, other, "--max-tokens", "8", "--json").stdout)
    assert [entry["name"] for entry in found["results"]] == [str(toy), str(other)]


def test_default_window_is_the_smallest_context(toy: Path) -> None:
    assert json.loads(run(toy, "--max-tokens", "40", "--json").stdout)["window"] == 10


def test_html_page_holds_table_and_plots_and_nothing_from_outside(demo: Export, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    page, checkpoint = tmp_path / "page.html", demo.bundle.parent / "checkpoint"
    result = run(demo.bundle, checkpoint, "--reference", DEMO, "--max-tokens", "200", "--html", page, "--json")
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    kl = json.loads(result.stdout)["results"][0]["kl"]
    assert f"<td>{kl:.5f}</td>" in text and "Protocol <b>hf</b>" in text
    assert text.count("<svg") == 3 and "Relative error of each layer" in text
    assert "<script" not in text and "src=" not in text and '<link rel="' not in text
    assert list(tmp_path.iterdir()) == [page]


def test_html_page_without_a_reference_has_no_empty_plots(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    page = tmp_path / "page.html"
    assert run(toy, "--max-tokens", "8", "--html", page).exit_code == 0
    assert "<svg" not in page.read_text(encoding="utf-8") and "toy" in page.read_text(encoding="utf-8")


def test_an_interrupted_page_leaves_the_old_one(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    page = tmp_path / "page.html"
    page.write_text("old")

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    assert run(toy, "--max-tokens", "8", "--html", page).exit_code == 130
    assert page.read_text() == "old" and list(tmp_path.iterdir()) == [page]


def write_cloze(folder: Path) -> list[dict[str, Any]]:
    """A task over a JSONL file, as docs/measure/evaluation.md shows one."""
    docs: list[dict[str, Any]] = [
        {"context": "And the LORD said unto", "choices": [" Moses", " acknowledged", " whale"], "label": 0},
        {"context": "It is a truth universally", "choices": [" begat", " acknowledged"], "label": 1},
        {"context": "In the beginning God created the", "choices": [" heaven", " carriage"], "label": 0},
        {"context": "Call me", "choices": [" Ishmael.", " begat the daughters of Israel."], "label": 1},
    ]
    (folder / "cloze.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "cloze.yaml").write_text(
        f"task: my_cloze\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'cloze.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    return docs


def test_a_task_over_jsonl_runs_offline_and_scores_as_transformers_does(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the package lm-eval, of the eval extra")
    docs = write_cloze(tmp_path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [
            *COMMAND,
            str(DEMO),
            "--reference",
            str(DEMO),
            "--max-tokens",
            "20",
            "--tasks",
            str(tmp_path / "cloze.yaml"),
            "--json",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (result,) = found["results"]
    assert found["reference"]["tasks"] == result["tasks"], "the original is scored beside it"
    model, tokenizer = hf_model(DEMO), AutoTokenizer.from_pretrained(DEMO)
    right = 0
    for doc in docs:
        scores = []
        before = len(tokenizer(doc["context"], add_special_tokens=False)["input_ids"])
        for choice in doc["choices"]:
            ids = torch.tensor([2, *tokenizer(doc["context"] + choice, add_special_tokens=False)["input_ids"]])
            log_p = hf_logits(model, ids).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            scores.append(float(log_p[before:].sum()))
        right += int(np.argmax(scores)) == doc["label"]
    assert result["tasks"]["my_cloze"]["acc"] == right / len(docs)
    assert 0 < right < len(docs)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["{tmp}/missing"], ["missing is not a folder"]),
        (["{tmp}"], ["neither a bundle", "nor a Hugging Face model folder"]),
        (["{toy}", "--reference", "{tmp}/missing"], ["missing is not a folder"]),
        (["{toy}", "--backend", "tflite"], ["holds no 'tflite' backend, only onnx"]),
        (["{toy}", "--protocol", "mine"], ["--protocol mine", "hf, llama.cpp"]),
        (["{toy}", "--window", "11"], ["--window 11", "looks back on 10 tokens", "4 to 10"]),
        (["{toy}", "--window", "3"], ["--window 3", "4 to 10"]),
        (["{toy}", "--max-tokens", "-1"], ["--max-tokens -1"]),
        (["{toy}", "--max-tokens", "1"], ["too short"]),
        (["{toy}", "--text", "{tmp}/missing.txt"], ["missing.txt does not exist"]),
        (["{toy}", "--text", "{tmp}/empty.txt"], ["empty.txt is empty"]),
        (["{toy}", "--text", "{tmp}/latin1.txt"], ["latin1.txt is not UTF-8 at byte 3"]),
        (["{toy}", "--text", "{tmp}/short.txt", "--protocol", "llama.cpp"], ["too short", "needs 9"]),
        (["{toy}", "--html", "{tmp}/missing/page.html"], ["--html", "a folder that exists"]),
        (["{toy}", "--html", "{tmp}"], ["--html", "no file can be written there"]),
        (["{bare}"], ["bare has no tokenizer", "--reference"]),
        (["{toy}", "--reference", "{tiny}"], ["different vocabularies", "vocab_size 320 and 4096"]),
        (["{toy}", "--tasks", " , "], ["--tasks names no task"]),
        (["{toy}", "--tasks", "mine", "--limit", "0"], ["--limit 0 is below 1"]),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], parts: list[str], toy: Path, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    for name, content in (("empty.txt", b" \n"), ("latin1.txt", b"caf\xe9"), ("short.txt", b"Amen.")):
        (tmp_path / name).write_bytes(content)
    places = {"tmp": tmp_path, "toy": toy, "tiny": "", "bare": ""}
    if "{tiny}" in args:
        places["tiny"] = checkpoint("tiny")
    if "{bare}" in args:
        places["bare"] = write_toy_bundle(tmp_path / "bare", tokenizer=False)
    refused(run(*(arg.format(**places) for arg in args)), *parts)


TYPED = {
    "models": ["MODEL"], "reference": ["--reference", "FOLDER"], "texts": ["--text", "TEXT"], "protocol": ["--protocol", "hf"],
    "window": ["--window", "8"], "max_tokens": ["--max-tokens", "8"], "backend": ["--backend", "onnx"],
    "threads": ["--threads", "1"], "tasks": ["--tasks", "mine"], "include_path": ["--include-path", "FOLDER"],
    "limit": ["--limit", "3"], "memorization": ["--memorization", "TEXT"], "as_json": ["--json"], "html": ["--html", "PAGE"],
}  # fmt: skip


def test_every_pair_of_options_is_heeded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """--limit and --include-path were ignored without --tasks."""
    assert set(TYPED) == {option.name for option in main.params} - {"version"}
    monkeypatch.setattr("gemma_edge.evaluate.cli.need", lambda option, package: None)
    monkeypatch.setattr("gemma_edge.evaluate.cli.check_writable", lambda option, path: None)
    monkeypatch.setattr("gemma_edge.evaluate.cli._show", lambda *args: None)
    calls: list[Any] = []
    monkeypatch.setattr("gemma_edge.evaluate.evaluate.evaluate", lambda options, progress: calls.append(options))
    for first, second in itertools.combinations([name for name in TYPED if name != "models"], 2):
        done = run("MODEL", *TYPED[first], *TYPED[second])
        unused = [name for name in ("include_path", "limit") if name in (first, second)]
        if not unused or "tasks" in (first, second):
            assert done.exit_code == 0 and calls.pop().models == (Path("MODEL"),), (first, second, done.output)
        else:
            refused(done, f"{TYPED[unused[0]][0]} has no effect without --tasks; leave it out")
    assert calls == []


@pytest.mark.parametrize("option", [["--backend", "onnx"], ["--threads", "1"]], ids=" ".join)
def test_options_of_bundles_are_refused_where_there_is_none(option: list[str]) -> None:
    refused(
        run(DEMO, "--max-tokens", "8", *option), f"{' '.join(option)} has no effect", "no bundle is among the models"
    )


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a & b", "cost$ in $dollars$", "\"><svg onload='a'>", "$(reboot) --> ]]>"]
)
def test_what_a_model_is_called_is_text_on_the_page(name: str, tmp_path: Path) -> None:
    """A folder's name went through four hand-written escapes, and a dollar sign was a formula in the plots."""
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    from gemma_edge.evaluate.html import page
    from gemma_edge.evaluate.result import Evaluation
    from gemma_edge.evaluate.result import Result as Measured

    result = Measured(name, name, "bundle", "onnx", 1, 4.5, "hf", 8, tokens=8, ppl=2.0, kl=0.1, top1=0.5)
    result.tasks = {name: {name: 0.5}}
    found = Page(page(Evaluation("hf", 8, [name], None, [result], [name])))
    # the text (its last part), the note, the table, the tasks' columns, task, metric; the legend of the plot
    assert found.text.count(name) >= 6 and found.scripts == []


def test_models_whose_tokenizers_differ_are_refused(toy: Path, tmp_path: Path) -> None:
    other = write_toy_bundle(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    # the same size, but two tokens of the text have changed places
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁and"] = vocabulary["▁and"], vocabulary["▁the"]
    text = json.dumps(tokenizer)
    (other / "tokenizer.json").write_text(text)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["bytes"] = len(text)
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(run(toy, other), "different tokenizers")


@pytest.mark.parametrize(
    ("package", "args", "parts"),
    [
        ("lm_eval", ["{toy}", "--tasks", "mine"], ["--tasks needs lm_eval", "gemma-edge[eval]"]),
        ("matplotlib", ["{toy}", "--html", "page.html"], ["--html needs matplotlib", "gemma-edge[eval]"]),
        ("torch", ["{demo}"], ["is a Hugging Face folder", "needs PyTorch", "gemma-edge[export]"]),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, args: list[str], parts: list[str], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    refused(run(*(arg.format(toy=toy, demo=DEMO) for arg in args)), *parts)


def test_an_unknown_task_is_refused(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = pytest.importorskip("gemma_edge.evaluate.lm_eval_adapter", reason="needs the package lm-eval")
    index = adapter.TaskManager

    def own_tasks_only(include_path: Path | None = None, include_defaults: bool = True) -> Any:
        """Indexing lm-eval's own takes many seconds."""
        return index(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(adapter, "TaskManager", own_tasks_only)
    refused(run(toy, "--tasks", "hellaswog", "--include-path", tmp_path), "--tasks hellaswog", "no such task")


def test_help_and_a_bundle_load_neither_torch_nor_lm_eval_nor_matplotlib(toy: Path) -> None:
    for args in (["--help"], [str(toy), "--max-tokens", "8"]):
        code = (
            "import sys\nfrom gemma_edge.evaluate.cli import main\n"
            f"main({args!r}, standalone_mode=False)\n"
            "heavy = {'torch', 'onnx', 'transformers', 'lm_eval', 'matplotlib'} & set(sys.modules)\n"
            "sys.exit(f'imported: {heavy}' if heavy else 0)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
