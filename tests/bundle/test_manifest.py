"""Reading a manifest: what the parts must agree on, and files that are no manifest at all."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.full_manifest import DIFFERENCE, GATE, write_full_bundle
from support.toys import edit_json, toy_manifest

from gemma_edge.bundle import manifest as bundles
from gemma_edge.bundle.entries import FileEntry
from gemma_edge.bundle.manifest import MANIFEST, Manifest, typed_config, with_identities
from gemma_edge.errors import InputError
from gemma_edge.model.config import GEMMA2_2B


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_full_bundle(tmp_path / "bundle")


def edit(bundle: Path, path: str, value: object) -> None:
    """Put a value at `backends.onnx.cache.layers.0.slots`."""
    manifest: Any = json.loads((bundle / MANIFEST).read_text())
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    parent = manifest
    for key in keys:
        parent = parent[key]
    parent[last] = value
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "backends/onnx/cache/layers/0/slots",
            -5,
            r"backends.onnx.cache.layers\[0\].slots is -5; it must be a whole num",
        ),
        ("backends/onnx/cache/layers/0/slots", 8, r"layers\[0\].slots is 8; it must be from 9 .pinned . window"),
        ("backends/onnx/cache/layers/0/window", 9, r"layers\[0\].window is 9; it must be 6, the smaller"),
        ("backends/onnx/cache/layers/1/window", 6, r"layers\[1\].window is 6; it must be 10, as context says"),
        ("backends/onnx/cache/layers", [], r"backends.onnx.cache.layers is a list; it must be a list of 2 layers"),
        ("backends/onnx/cache/prefill_chunk", 4097, r"cache.prefill_chunk is 4097; it must be a whole number <= 4096"),
        ("backends/onnx/cache/kv_heads", 4, "cache.kv_heads is 4; it must be 2, as config.num_key_value_heads says"),
        (
            "backends/onnx/cache/dtype",
            "float8",
            'cache.dtype is "float8"; it must be one of "float16", "float32", "int8"',
        ),
        ("backends/onnx/cache/dtype", "int8", 'plan.kv_dtype is "float32"; it must be int8, as the cache says'),
        ("backends/onnx/plan/kv_bytes", 1, "backends.onnx.plan.kv_bytes is 1; it must be 5632, as the cache says"),
        (
            "backends/onnx/settings/generate",
            "gone",
            'settings.generate is "gone"; it must be one of the names in files',
        ),
        ("backends/onnx/settings/accuracy_level", 2, "settings.accuracy_level is 2; it must be one of 0, 4"),
        ("backends/onnx/identity", "0" * 63, "backends.onnx.identity is .*; it must be text of length >= 64"),
        ("backends/tflite/settings/signatures/3/longest", 11, r"signatures\[3\].longest is 11; .* cache.context, 10"),
        ("backends/tflite/settings/signatures/1/longest", 8, "tflite.settings.signatures is a list; .* of role decode"),
        ("backends/tflite/settings/signatures/1/name", "short_1", r"\[3\].name is .short_1.; it must be another name"),
        (
            "backends/tflite/settings/signatures/0/tokens",
            5,
            r"\[0\].tokens is 5; it must be at most cache.prefill_chunk",
        ),
        ("backends", {}, "backends is an object; it must be an object with at least one backend"),
        ("config/eos_token_id", [1, 4096], r"config.eos_token_id\[1\] is 4096; it must be below vocab_size, 4096"),
        ("config/eos_token_id", [], "config.eos_token_id is a list; it must be a list of at least one token id"),
        ("config/bos_token_id", 5000, "config.bos_token_id is 5000; it must be below vocab_size"),
        ("config/num_hidden_layers", 3, r"config.layer_types is a list; it must be a list of 3 .num_hidden_layers"),
        ("config/num_attention_heads", 3, "config.num_key_value_heads is 2; it must be a divisor"),
        ("config/head_dim", 15, "config.head_dim is 15; it must be even"),
        ("target/threads", 0, "target.threads is 0; it must be a whole number >= 1"),
        ("files/score.onnx/sha256", "x" * 64, r'files\["score.onnx"\].sha256 is .*; it must be text matching'),
        ("verification/onnx/passed", False, "verification.onnx.passed is false; it must be true if failures is empty"),
        ("verification/other", None, "verification.other is null; it must be an object"),
        ("model/architecture", "gemma3", 'model.architecture is "gemma3"; it must be one of "gemma", "gemma2"'),
        (
            "config/architecture",
            "gemma3_text",
            'architecture is "gemma2"; it must be gemma3_text, as config.architecture',
        ),
        ("schema_version", "3", 'schema_version is "3"; it must be'),
        ("schema_version", 2, "schema_version 2, this gemma-edge reads 3; export the bundle again"),
        ("schema_version", 4, "schema_version 4, this gemma-edge reads 3; export the bundle again"),
    ],
)
def test_what_the_parts_do_not_agree_on_is_named(bundle: Path, path: str, value: object, message: str) -> None:
    edit(bundle, path, value)
    with pytest.raises(InputError, match=message) as caught:
        Manifest.load(bundle)
    assert str(bundle / MANIFEST) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "a\0b", "x" * 300, "", "a\nb", "."])
def test_odd_names_of_files_are_refused(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    edit_json(bundle / MANIFEST, files={**manifest["files"], name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(InputError, match="lies outside the bundle|is not a file name|is missing") as caught:
        Manifest.load(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is damaged"),
        (b"\xef\xbb\xbf{}", "is damaged .*byte order mark"),
        (b'{"schema_version": 3, "created": "\xff"}', "is damaged .*not UTF-8 at byte 34"),
        ("{}".encode("utf-16"), "is damaged"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"a":' * 100_000, "nested more than 100 deep"),
        (b'{"schema_version": 3, "model": {"name": 1, "name": 2}}', 'the key "name" stands twice'),
        (b'{"schema_version": ' + b"1" * 5000 + b"}", "is damaged"),
        (b'{"schema_version": 3, "config": {"rope_theta": 1e999}}', "config.rope_theta is Infinity; .* finite"),
        (b"[]", "the whole file is a list; it must be an object"),
        (b"{}", "schema_version is missing"),
        (b'"text"', "the whole file is .text.; it must be an object"),
    ],
)
def test_what_is_no_manifest_is_one_clear_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_too_large_or_no_file_is_not_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(InputError, match=r"manifest.json has \d+ bytes; at most 1000 are read"):
        Manifest.load(bundle)
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)  # to read it would never end
    with pytest.raises(InputError, match="is a pipe, not a regular file"):
        Manifest.load(bundle)


def test_what_is_written_is_what_is_read(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.to_json() == (bundle / MANIFEST).read_text()
    assert manifest.backends["of-the-future"].settings == {"any": ["thing", 1, None]}
    assert with_identities(manifest) == manifest


def test_a_manifest_from_before_there_were_untied_heads_has_a_tied_one(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert manifest["config"].pop("tie_word_embeddings") is True
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert Manifest.load(bundle).config.tie_word_embeddings


def test_a_manifest_from_before_gemma3_is_of_gemma2(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    for key in ("architecture", "qk_norm", "rope_factor", "rope_local_base_freq", "rope_local_factor"):
        del manifest["config"][key]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    config = Manifest.load(bundle).config
    assert config == toy_manifest().config and config.architecture == "gemma2" and not config.qk_norm


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_nan_when_it_is_read(bundle: Path) -> None:
    broken = replace(GATE, lowering=replace(DIFFERENCE, kl=math.nan, ppl=math.inf), failures=("kl",), passed=False)
    manifest = replace(Manifest.load(bundle), verification={"onnx": broken})
    (bundle / MANIFEST).write_text(manifest.to_json())
    assert json.loads(manifest.to_json())["verification"]["onnx"]["lowering"]["kl"] is None
    lowering = Manifest.load(bundle).verification["onnx"].lowering
    assert math.isnan(lowering.kl) and math.isnan(lowering.ppl) and lowering.top1 == DIFFERENCE.top1


def test_the_identity_changes_with_every_file_the_cache_and_the_model() -> None:
    manifest = toy_manifest(files={"a": FileEntry(1, "0" * 64), "b": FileEntry(1, "1" * 64)})
    entry = manifest.backends["onnx"]

    def identity(**changes: Any) -> str:
        return with_identities(replace(manifest, **changes)).backends["onnx"].identity

    others = [
        identity(files={**manifest.files, "b": FileEntry(1, "2" * 64)}),
        identity(files={"a": manifest.files["a"]}),
        identity(config=replace(manifest.config, rope_theta=1.0)),
        identity(backends={"onnx": replace(entry, cache=replace(entry.cache, dtype="int8"))}),
        with_identities(replace(manifest, backends={"other": entry})).backends["other"].identity,
    ]
    assert len({entry.identity, *others}) == 6
    assert identity(created="later", target=replace(manifest.target, threads=1)) == entry.identity


def test_a_models_configuration_is_refused_before_the_work() -> None:
    config = GEMMA2_2B.to_json()
    assert typed_config(config).eos_token_id == (1, 107)
    with pytest.raises(InputError, match=r"config.eos_token_id\[0\] is 300000; it must be below vocab_size"):
        typed_config({**config, "eos_token_id": [300000]})
