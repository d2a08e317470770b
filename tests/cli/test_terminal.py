"""Names out of a bundle, notes and a model's answer do not control the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.toys import toy_manifest, write_toy_bundle

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.command import note
from gemma_edge.errors import without_controls
from gemma_edge.export.cli import main
from gemma_edge.export.report import stages_table
from gemma_edge.report.console import OUT
from gemma_edge.runtimes.engines.base import Stats
from gemma_edge.runtimes.generation.console import Output, show

EVIL = "x\x1b]0;pwned\x07\x9b31m[bold]"
SHOWN = "x\\x1b]0;pwned\\x07\\x9b31m[bold]"


def test_names_in_a_manifest(tmp_path: Path) -> None:
    whole = toy_manifest()
    part = whole.recipe.parts[0] if whole.recipe.parts else None
    recipe = replace(whole.recipe, name=EVIL, parts=(replace(part, part=EVIL),) if part else ())
    bundle = write_toy_bundle(
        tmp_path / "bundle",
        model=replace(whole.model, name=EVIL),
        target=replace(whole.target, name=EVIL),
        recipe=recipe,
    )
    assert Manifest.load(bundle).model.name == EVIL
    printed = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert printed.exit_code == 0 and printed.stdout.count(SHOWN) >= 3
    assert without_controls(printed.stdout) == printed.stdout


def test_a_title_and_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    OUT.print(stages_table(EVIL, []))
    note(EVIL)
    printed = capsys.readouterr()
    assert SHOWN in printed.out and printed.err == f"note: {SHOWN}\n"


class Nothing:
    """What `show` needs of a runtime."""

    stats = Stats()


@pytest.mark.parametrize("on_terminal", [True, False])
def test_an_answer(on_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, escapes; in a pipe or a file, what the model wrote."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    answer = "a\tb\x1b[2J\r\nc \U0001f469\u200d\U0001f680\n"
    show(Nothing(), iter([answer]), lambda: [1], lambda: False, Output(as_json=False, stats=False))  # type: ignore[arg-type]
    shown = answer.replace("\x1b", "\\x1b").replace("\r", "\\r")
    assert capsys.readouterr().out == (shown if on_terminal else answer)
