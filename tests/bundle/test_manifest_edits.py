"""A campaign: every key of a manifest gets a wrong type, goes missing, becomes negative, huge, null and more.

Each edited bundle either opens, or is refused in one line that names the key, by the library and by every command.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from support.full_manifest import write_full_bundle

import gemma_edge
from gemma_edge.bench.cli import main as bench_main
from gemma_edge.bundle.codec import Key, key_path
from gemma_edge.bundle.manifest import MANIFEST, Manifest
from gemma_edge.errors import InputError
from gemma_edge.evaluate.cli import main as eval_main
from gemma_edge.export.cli import main as export_main
from gemma_edge.runtimes.cli import main as run_main

SEED, EDITS = 15, 300
FULL_RUNS = 8  # accepted edits after which gemma-eval and gemma-bench measure, instead of only opening the bundle
DEEP = "[" * 100_000 + "]" * 100_000
MISSING = object()
WRONG_TYPES: dict[type, object] = {
    str: 5,
    int: "5",
    float: "0.5",
    bool: 1,
    list: {"0": 1},
    dict: ["x"],
    type(None): {"an": "object"},
}


@dataclass(frozen=True)
class Edit:
    """Something else in place of one value."""

    keys: tuple[Key, ...]
    kind: str
    value: object

    def apply(self, manifest: dict[str, Any]) -> str:
        """The text of the edited manifest."""
        edited = copy.deepcopy(manifest)
        parent: Any = edited
        for key in self.keys[:-1]:
            parent = parent[key]
        if self.value is MISSING:
            del parent[self.keys[-1]]
        else:
            parent[self.keys[-1]] = self.value
        return json.dumps(edited).replace('"@deep@"', DEEP)

    def is_named_in(self, message: str) -> bool:
        """Whether a message says where to look. A list or a mapping with one entry too few is named itself."""
        places = [key_path(self.keys), *([key_path(self.keys[:-1])] if self.kind == "missing" else [])]
        return self.kind == "deep" or any(place and place in message for place in places)


def key_paths(value: Any, keys: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Every key of nested objects and lists, with what stands there."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, under in inner:
        yield (*keys, key), under
        yield from key_paths(under, (*keys, key))


def all_edits(manifest: dict[str, Any]) -> list[Edit]:
    """Every edit of every key."""
    edits = []
    for keys, value in key_paths(manifest):
        kinds = {
            "wrong type": WRONG_TYPES[type(value)],
            "missing": MISSING,
            "negative": -5,
            "huge": 10**30,
            "null": None,
            "empty": "",
            "unknown": "@unknown@\n[/x]`bits`",
            "nan": float("nan"),
            "infinite": float("-inf"),
            "surrogate": "\ud800",
            "deep": "@deep@",
        }
        edits += [Edit(keys, kind, changed) for kind, changed in kinds.items()]
    return edits


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_bundle(tmp_path_factory.mktemp("edits") / "bundle")


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return data


def refusal_of(bundle: Path) -> str | None:
    """Why a bundle is not opened; None where it is."""
    try:
        Manifest.load(bundle)
    except InputError as error:
        return str(error)
    return None


def test_every_edit_of_every_key_opens_or_is_refused_in_one_line_that_names_it(
    bundle: Path, manifest: dict[str, Any]
) -> None:
    edits = [edit for edit in all_edits(manifest) if edit.kind != "deep"]
    refused = 0
    for edit in edits:
        (bundle / MANIFEST).write_text(edit.apply(manifest))
        message = refusal_of(bundle)
        refused += message is not None
        if message is not None:
            assert "\n" not in message and len(message) < 600, (edit, message)
            assert edit.is_named_in(message), (edit, message)
    sys.stdout.write(f"{len(edits)} tried, {refused} refused, {len(edits) - refused} accepted, 0 tracebacks\n")
    assert len(edits) > 2000 and refused > 0.8 * len(edits)


def invoke(main: click.Command, *args: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    unexpected = None if isinstance(result.exception, SystemExit) else result.exception
    assert unexpected is None and "Traceback" not in result.output, (args, result.output, result.exc_info)
    return result


def commands(bundle: Path, *, measured: bool) -> Iterator[Result]:
    """Every command that opens a bundle."""
    yield invoke(export_main, "inspect", bundle)
    yield invoke(export_main, "inspect", bundle, "--json")
    yield invoke(run_main, bundle, "--prompt", "x", "--max-tokens", "1", "--threads", "1", "--backend", "onnx")
    if measured:
        yield invoke(eval_main, bundle, "--max-tokens", "4", "--threads", "1", "--backend", "onnx")
        yield invoke(bench_main, bundle, "--backend", "onnx", "-p", "3", "-n", "2", "-r", "1", "-t", "1")


def test_every_command_opens_an_edited_bundle_or_refuses_it_in_one_line(bundle: Path, manifest: dict[str, Any]) -> None:
    edits = random.Random(SEED).sample(all_edits(manifest), EDITS)
    refused = accepted = 0
    for edit in edits:
        (bundle / MANIFEST).write_text(edit.apply(manifest))
        message = refusal_of(bundle)
        if message is None:
            accepted += 1
            runnable = "onnx" in Manifest.load(bundle).backends
            assert not runnable or gemma_edge.load(bundle, backend="onnx", threads=1).prefill([2, 3]).shape == (4096,)
            for result in commands(bundle, measured=accepted <= FULL_RUNS):
                assert result.exit_code == 0, (edit, result.output)
            continue
        refused += 1
        with pytest.raises(InputError, match=re.escape(message)):
            gemma_edge.load(bundle)
        for result in commands(bundle, measured=True):
            assert result.exit_code == 2 and result.stdout == "", (edit, result.output)
            (line,) = result.stderr.splitlines()
            assert line == f"error: {' '.join(message.split())}"
    sys.stdout.write(f"{len(edits)} tried, {refused} refused, {accepted} accepted, 0 tracebacks\n")
    assert refused + accepted == EDITS and accepted > FULL_RUNS
