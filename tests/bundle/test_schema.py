"""The JSON Schema in docs/: made from the dataclasses, true of real manifests, and naming every key that Kotlin reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from support.checkpoints import ROOT
from support.full_manifest import write_full_bundle

from gemma_edge.bundle.entries import ModelConfig
from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.bundle.schema import manifest_schema, schema_text
from gemma_edge.export.api import Export
from gemma_edge.model.config import GemmaConfig

PAGE = ROOT / "docs" / "export" / "manifest.schema.json"
KOTLIN = ROOT / "android_demo" / "gemma" / "src" / "main" / "kotlin" / "gemma" / "edge"
READERS = [KOTLIN / name for name in ("Bundle.kt", "Backend.kt")]
BACKENDS = ("onnx", "executorch", "tflite")  # those that Kotlin knows; its sources call any of them `name`


def errors(manifest: Any) -> list[str]:
    return [error.json_path for error in Draft202012Validator(json.loads(PAGE.read_text())).iter_errors(manifest)]


def test_the_schema_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == schema_text(), (
        "python -m gemma_edge.bundle.schema > docs/export/manifest.schema.json"
    )
    Draft202012Validator.check_schema(manifest_schema())


def test_manifests_of_real_and_of_full_bundles_are_valid(talking: Export, tmp_path: Path) -> None:
    full = write_full_bundle(tmp_path / "full")
    for bundle in (talking.bundle, full):
        assert errors(json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("keys", "value", "at"),
    [
        (("target", "threads"), 0, "$.target.threads"),
        (("backends", "onnx", "settings", "accuracy_level"), 2, "$.backends.onnx.settings.accuracy_level"),
        (("backends", "tflite", "settings", "signatures"), {}, "$.backends.tflite.settings.signatures"),
        (("schema_version",), 2, "$.schema_version"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(
    keys: tuple[str, ...], value: object, at: str, tmp_path: Path
) -> None:
    manifest = json.loads((write_full_bundle(tmp_path / "full") / MANIFEST).read_text())
    parent = manifest
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    assert errors(manifest) == [at]


def test_a_manifest_holds_every_key_of_the_models_configuration() -> None:
    assert [field.name for field in fields(ModelConfig)] == [field.name for field in fields(GemmaConfig)]


def kotlin_paths(source: str) -> set[tuple[str, ...]]:
    """The paths of keys that Kotlin asks of the manifest: `manifest["a"]["b"]`, also through `val x = manifest["a"]`."""
    known: dict[str, tuple[str, ...]] = {"manifest": ()}
    found = set()
    for name, parent, chain in re.findall(r'(?:val (\w+) = )?\b(\w+)((?:\["\w+"\]|\[name\])+)', source):
        if parent in known:
            path = (*known[parent], *re.findall(r'\["?(\w+)', chain))
            found.add(path)
            if name:
                known[name] = path
    return found


def names(schema: Any) -> Iterator[str]:
    """Every key that a schema names, at any depth."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from names(inner)


def leads_somewhere(path: tuple[str, ...]) -> bool:
    """Whether the schema has such a key, for one of the backends if the path leads through `name`."""
    if path[:2] == ("backends", "name"):
        return any(leads_somewhere((path[0], backend, *path[2:])) for backend in BACKENDS)
    schema = manifest_schema()
    node: Any = schema
    for key in path:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        node = node.get("properties", {}).get(key) or node.get("additionalProperties")
        if not isinstance(node, dict):
            return False
    return True


def test_every_key_that_kotlin_reads_is_in_the_schema() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in READERS)
    paths = kotlin_paths(source)
    assert {("schema_version",), ("config", "vocab_size"), ("backends", "name", "identity")} <= paths
    assert {path for path in paths if not leads_somewhere(path)} == set()
    every = set(names(manifest_schema()))
    assert {key for key in re.findall(r'\["(\w+)"\]', source) if key not in every} == set()
