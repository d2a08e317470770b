"""Names that a bundle or a phone brings are text, also in the phone's shell. A stand-in records what the shell gets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import ROOT
from support.toys import write_toy_bundle

from gemma_edge.bench import phones
from gemma_edge.bench.machine import FLAGS
from gemma_edge.bench.phones import Facts, PhoneBundle, facts
from gemma_edge.bundle.entries import FileEntry
from gemma_edge.bundle.manifest import Manifest

FOLDERS = ("parts $(reboot)", "a;reboot", "`reboot`", "it's")


class Recorder:
    """A phone that keeps the commands it gets, and gives an answer that is set beforehand."""

    def __init__(self, answers: Callable[[str], str] = lambda command: "") -> None:
        self.serial = "$(reboot)"
        self.commands: list[str] = []
        self.sent: list[str] = []
        self._answers = answers

    def shell(self, command: str, **_: Any) -> str:
        self.commands.append(command)
        return self._answers(command)

    def size(self, path: str) -> int:
        return 0

    def send(self, local: Path, remote: str, *_: Any) -> None:
        self.sent.append(remote)


@contextmanager
def quiet(what: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def test_folders_of_a_bundle_are_words_of_the_phones_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdir got the names without quotes, so a bundle could run commands on the phone."""
    bundle = write_toy_bundle(tmp_path / "bundle")
    manifest = Manifest.load(bundle)
    for folder in FOLDERS:
        (bundle / folder).mkdir()
        (bundle / folder / "file").write_text("")
    files = {f"{folder}/file": FileEntry(0, "0" * 64) for folder in FOLDERS}
    manifest = replace(manifest, files={**manifest.files, **files})
    monkeypatch.setattr(phones, "facts", lambda phone: Facts({}, 35, ("x86_64",), 1 << 40, 1 << 40))
    monkeypatch.setattr(phones, "check", lambda *_: None)
    phone = Recorder()
    PhoneBundle(phone, bundle, manifest).send(quiet)  # type: ignore[arg-type]
    (command,) = (command for command in phone.commands if command.startswith("mkdir"))
    assert {path.rpartition("/")[2] for path in shlex.split(command)[2:]} >= set(FOLDERS)
    assert any("it's/file" in path for path in phone.sent)


def test_a_property_of_several_lines_stays_one_value() -> None:
    """The second line of a property became the value of the next property, and all later ones moved too."""
    values = {
        "ro.product.model": "Pho\nne\x1b[2J <script>",
        "ro.build.version.sdk": "35",
        "ro.product.cpu.abilist": "x86_64",
    }

    def answer(command: str) -> str:
        if "getprop" not in command:
            return ""
        words = (part.strip().split() for part in command.split(";"))
        return "\n".join(values.get(word[1], "") if word[0] == "getprop" else word[1] for word in words)

    known = facts(Recorder(answer))  # type: ignore[arg-type]
    assert known.device["name"] == "Pho ne[2J <script>" and known.sdk == 35 and known.abis == ("x86_64",)


def test_the_app_names_the_same_instruction_sets_as_this_machine() -> None:
    source = (ROOT / "android_demo/gemma/src/main/kotlin/gemma/edge/BenchmarkSystem.kt").read_text(encoding="utf-8")
    (names,) = re.findall(r"val FLAGS = listOf\((.*?)\)", source)
    assert tuple(re.findall(r'"(\w+)"', names)) == FLAGS


def test_the_app_tries_the_backends_in_the_order_that_is_documented_here() -> None:
    source = (ROOT / "android_demo/gemma/src/main/kotlin/gemma/edge/engine/Engine.kt").read_text(encoding="utf-8")
    assert tuple(re.findall(r'(?m)^    [A-Z]+\("(\w+)", "', source)) == phones.BACKENDS
