"""`gemma-export card`: what the manifest says, in Markdown, written whole, and pushed to Hugging Face in one commit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import refused, run
from support.full_manifest import write_full_bundle

from gemma_edge.bundle.manifest import MANIFEST, Manifest
from gemma_edge.export.card.card import CardOptions, card
from gemma_edge.export.report import gate_lines


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_full_bundle(tmp_path / "bundle")


def test_the_card_says_what_the_manifest_says(bundle: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib, of the eval extra")
    before = {path.name for path in bundle.iterdir()}
    done = run("card", bundle, "--base", "google/gemma-2-2b-it")
    assert done.exit_code == 0, done.output
    assert {path.name for path in bundle.iterdir()} == before | {"README.md", "card-sizes.png", "card-layers.png"}
    text, manifest = (bundle / "README.md").read_text(encoding="utf-8"), Manifest.load(bundle)
    head = ['license: "gemma"', "license_link: https://ai.google.dev/gemma/terms", 'base_model: "google/gemma-2-2b-it"']
    assert text.splitlines()[:4] == ["---", *head]
    for line in gate_lines(manifest):
        assert line in text
    plain = text.replace("\\", "")
    for name in manifest.files:
        assert f"| {name} |" in plain
    assert (
        "| mlp.down_proj | 4 | 32 |" in plain and "int4-g32" in plain and "256 tokens of calibration_kjv.txt" in plain
    )
    assert "](card-sizes.png)" in text and "](card-layers.png)" in text and "Gemma's terms of use" in text
    assert (bundle / "card-sizes.png").read_bytes().startswith(b"\x89PNG")
    assert run("inspect", bundle, "--check-hashes").exit_code == 0, "the bundle is as before"
    for name in ("pte", "tflite"):
        assert f"model.{name}" in plain


def test_without_matplotlib_there_are_no_plots(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_edge.export.card.card.find_spec", lambda name: None)
    assert run("card", bundle, "-o", tmp_path / "card.md", "--license", "apache-2.0").exit_code == 0
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert (
        ".png" not in text
        and text.startswith('---\nlicense: "apache-2.0"\nlibrary_name')
        and "Gemma's terms" not in text
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "card.md"]


def test_an_older_card_is_replaced_only_when_told_and_by_a_whole_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "card.md"
    out.write_text("old")
    refused(run("card", bundle, "-o", out), f"{out} exists", "--force")

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        assert run("card", bundle, "-o", out, "--force").exit_code == 130
    assert out.read_text() == "old" and sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "card.md"]
    assert run("card", bundle, "-o", out, "--force").exit_code == 0 and out.read_text() != "old"


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a | b", "x\x1b[31m", "[a](http://b)", "$x$ `c`"])
def test_what_a_model_is_called_is_text(name: str, bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    text = card(replace(manifest, model=replace(manifest.model, name=name)), CardOptions(base=name))
    body = text.split("---\n", 2)[2]
    assert (
        "<script" not in body.replace("\\<", "") and "\x1b" not in text and "](http://b)" not in body.replace("\\]", "")
    )
    assert json.dumps(name) in text.split("---\n")[1]
    assert all(
        line.count("|") - line.count("\\|") == 3 for line in text.splitlines() if line.startswith("| base model")
    )


class FakeHub:
    """What `push` needs of huggingface_hub.HfApi."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[Any] = []

    def create_repo(self, repo_id: str, **choices: Any) -> None:
        self.calls.append(("create_repo", repo_id, choices))
        if self.error:
            raise self.error

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> Any:
        files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        self.calls.append(("create_commit", repo_id, files, commit_message))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    huggingface_hub = pytest.importorskip(
        "huggingface_hub", reason="needs the package huggingface_hub, of the hub extra"
    )
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_bundle_and_card_are_pushed_in_one_commit(bundle: Path, tmp_path: Path, hub: FakeHub) -> None:
    (bundle / "secret.txt").write_text("not of the bundle")
    done = run("card", bundle, "-o", tmp_path / "card.md", "--push", "me/toy")
    assert done.exit_code == 0 and "pushed: https://huggingface.co/me/toy/commit/1" in done.stderr
    (made, committed) = hub.calls
    assert made == ("create_repo", "me/toy", {"private": True, "exist_ok": True})
    files = committed[2]
    assert set(files) == {MANIFEST, *Manifest.load(bundle).files, "README.md", "card-sizes.png", "card-layers.png"}
    assert files["README.md"] == (tmp_path / "card.md").read_bytes()


def test_a_bundle_that_was_changed_is_not_pushed(bundle: Path, tmp_path: Path, hub: FakeHub) -> None:
    (bundle / "model.pte").write_bytes(b"PROGRAM")
    refused(run("card", bundle, "-o", tmp_path / "card.md", "--push", "me/toy"), "model.pte")
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_line(bundle: Path, tmp_path: Path, hub: FakeHub) -> None:
    hub.error = OSError("no network\nat all")
    done = run("card", bundle, "-o", tmp_path / "card.md", "--push", "me/toy")
    refused(done, "cannot push to me/toy (no network); run `hf auth login`")


def test_an_id_that_is_none_is_refused_before_anything_is_written(bundle: Path, tmp_path: Path) -> None:
    for wrong in ("toy", "me/toy/x", "me/<b>"):
        refused(
            run("card", bundle, "-o", tmp_path / "card.md", "--push", wrong), f"--push {wrong} is not a Hugging Face id"
        )
    assert not (tmp_path / "card.md").exists()


def test_what_is_no_bundle_has_no_card(tmp_path: Path) -> None:
    refused(run("card", tmp_path), "manifest.json")
