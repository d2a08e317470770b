"""The ONNX backend on a hand-made graph, against the same model in numpy. Real exports: tests/export/onnx/test_onnx_parity.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
from support.damage import reseal
from support.toys import (
    CHUNK,
    VOCAB,
    WINDOWS,
    toy_backend,
    toy_graph,
    toy_logits,
    toy_manifest,
    toy_settings,
    write_toy_bundle,
)

import gemma_edge
from gemma_edge.bundle.geometry import LayerCache
from gemma_edge.bundle.manifest import Manifest, list_files
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.load import refuse_older
from gemma_edge.runtimes.engines.onnx import OLDEST_ONNXRUNTIME, OnnxRuntime
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session

# float32 sums of 32 products in two orders; the logits are about 10, measured 1e-5
ATOL = 1e-4
LONG = 40  # tokens: four contexts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("onnx") / "bundle")


@pytest.fixture
def runtime(bundle: Path) -> OnnxRuntime:
    return OnnxRuntime(bundle, Manifest.load(bundle), threads=1)


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]


def test_prefill_and_decode_match_numpy_over_four_contexts(runtime: OnnxRuntime) -> None:
    ids = random_ids(LONG)
    expected = toy_logits(ids)
    np.testing.assert_allclose(runtime.prefill(ids[:7]), expected[6], atol=ATOL)
    for position in range(7, LONG):
        np.testing.assert_allclose(runtime.decode(ids[position]), expected[position], atol=ATOL)
    assert runtime.position == LONG


def test_score_matches_numpy_at_every_position(runtime: OnnxRuntime) -> None:
    ids = random_ids(LONG - 1)
    chunks = list(runtime.score_chunks(ids))
    assert [len(chunk) for chunk in chunks] == [CHUNK] * 9 + [3]
    np.testing.assert_allclose(np.concatenate(chunks), toy_logits(ids), atol=ATOL)


def test_fewer_positions_are_scored_at_once_where_their_logits_are_large(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of 128 positions of 256,000 tokens is 131 MB, and the graph needs as much again."""
    ids = random_ids(20)
    for rows, expected in ((3, [3] * 6 + [2]), (1, [1] * 20), (0, [1] * 20), (100, [CHUNK] * 5)):
        monkeypatch.setattr("gemma_edge.logits.SCORED_BYTES", 4 * VOCAB * rows)
        chunks = list(runtime.score_chunks(ids))
        assert [len(chunk) for chunk in chunks] == expected
        np.testing.assert_allclose(np.concatenate(chunks), toy_logits(ids), atol=ATOL)


def test_chunked_prefill_matches_one_token_at_a_time(runtime: OnnxRuntime, bundle: Path) -> None:
    ids = random_ids(LONG, seed=1)
    other = OnnxRuntime(bundle, Manifest.load(bundle), threads=1)
    for token in ids:
        one_by_one = other.prefill([token])
    np.testing.assert_allclose(runtime.prefill(ids), one_by_one, atol=ATOL)


def test_generation_goes_on_after_score_with_the_same_cache(runtime: OnnxRuntime) -> None:
    """The two graphs are loaded one at a time and share the buffers."""
    ids = random_ids(20)
    runtime.score(ids[:15])
    assert runtime.position == 15
    np.testing.assert_allclose(runtime.prefill(ids[15:]), toy_logits(ids)[-1], atol=ATOL)


def test_only_one_graph_is_in_memory(runtime: OnnxRuntime) -> None:
    assert runtime._loaded is not None and runtime._loaded.role == "generate"
    runtime.score([5])
    assert runtime._loaded.role == "score"
    runtime.decode(5)
    assert runtime._loaded.role == "generate"


def test_cache_is_written_in_place(runtime: OnnxRuntime) -> None:
    key = runtime._cache["0.key"].numpy()
    assert not key.any()
    runtime.prefill([7, 8])
    assert [bool(row.any()) for row in runtime._cache["0.key"].numpy()[0, 0, :3]] == [True, True, False]


def test_reset_forgets_exactly(runtime: OnnxRuntime) -> None:
    ids = random_ids(9)
    first = runtime.prefill(ids)
    runtime.prefill(random_ids(LONG, seed=2))
    runtime.reset()
    assert runtime.position == 0
    np.testing.assert_array_equal(runtime.prefill(ids), first)


def test_returned_logits_are_not_overwritten_by_the_next_call(runtime: OnnxRuntime) -> None:
    first = runtime.prefill([5])
    kept = first.copy()
    runtime.decode(6)
    np.testing.assert_array_equal(first, kept)
    scored = runtime.score([5, 6, 7])
    kept = scored.copy()
    runtime.score([8, 9, 10])
    np.testing.assert_array_equal(scored, kept)


def test_a_conversation_leaves_the_cache_as_a_fresh_prefill_of_the_same_tokens(bundle: Path) -> None:
    session = Session.open(bundle, threads=1)
    for text in ("Hello.", "It was a truth", "Who are you?"):
        assert "".join(session.send(text, GenerationOptions(max_tokens=7)))
    fresh = OnnxRuntime(bundle, Manifest.load(bundle), threads=1)
    fresh.prefill(session.ids)
    assert session.runtime.position == fresh.position == len(session.ids)
    np.testing.assert_allclose(session.runtime.decode(7), fresh.decode(7), atol=ATOL)


def test_threads_come_from_the_target_and_never_exceed_the_machine(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert OnnxRuntime(bundle, manifest, threads=None).threads == min(2, os.cpu_count() or 1)
    assert OnnxRuntime(bundle, manifest, threads=10_000).threads == os.cpu_count()
    with pytest.raises(InputError, match="threads 0 is below 1"):
        OnnxRuntime(bundle, manifest, threads=0)


def test_load_opens_the_onnx_backend_and_times_it(bundle: Path) -> None:
    runtime = gemma_edge.load(bundle, threads=1)
    assert isinstance(runtime, OnnxRuntime) and isinstance(runtime, Runtime)
    assert runtime.stats.load_s > 0
    runtime.prefill([2, 3, 4, 5, 6])
    runtime.decode(7)
    assert (runtime.stats.prefill_tokens, runtime.stats.decode_tokens) == (5, 1)
    with pytest.raises(InputError, match="holds no 'tflite' backend, only onnx"):
        gemma_edge.load(bundle, backend="tflite")


@pytest.mark.parametrize("ids", [[], [-1], [VOCAB]])
def test_impossible_tokens_are_refused(runtime: OnnxRuntime, ids: list[int]) -> None:
    with pytest.raises(InputError):
        runtime.prefill(ids)
    assert runtime.position == 0


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x00" * 1000])
def test_a_file_that_is_no_graph_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    (bundle / "generate.onnx").write_bytes(content)
    reseal(bundle)
    with pytest.raises(InputError, match="generate.onnx is damaged, or is not a graph of this bundle"):
        OnnxRuntime(bundle, Manifest.load(bundle), threads=1)


def test_a_truncated_graph_is_one_clear_error(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    graph = (bundle / "generate.onnx").read_bytes()
    (bundle / "generate.onnx").write_bytes(graph[: len(graph) // 2])
    reseal(bundle)
    with pytest.raises(InputError, match="generate.onnx is damaged"):
        OnnxRuntime(bundle, Manifest.load(bundle), threads=1)


def test_a_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    foreign = toy_graph("generate")
    foreign.graph.input[1].name = "seqlens_k"
    foreign.graph.node[1].input[0] = "seqlens_k"
    (bundle / "generate.onnx").write_bytes(foreign.SerializeToString())
    with pytest.raises(InputError, match="is not a graph of this bundle: input_pos is only in one of them"):
        OnnxRuntime(bundle, toy_manifest(files=list_files(bundle)), threads=1)


def test_a_cache_of_another_size_than_the_graph_is_refused(bundle: Path) -> None:
    """Binding a smaller buffer would let the graph write outside it."""
    layers = tuple(LayerCache(window, window) for window in WINDOWS)
    manifest = toy_manifest(backends={"onnx": toy_backend(layers=layers)}, files=list_files(bundle))
    with pytest.raises(InputError, match=r"past_key_values.0.key is .*, the manifest says"):
        OnnxRuntime(bundle, manifest, threads=1)


@pytest.mark.parametrize(
    ("name", "message"), [("../generate.onnx", "outside the bundle"), ("gone.onnx", "is missing; export")]
)
def test_a_graph_outside_the_bundle_or_missing_is_refused(bundle: Path, name: str, message: str) -> None:
    manifest = toy_manifest(backends={"onnx": toy_backend(toy_settings(name))})
    with pytest.raises(InputError, match=message):
        OnnxRuntime(bundle, manifest, threads=1)


def test_a_bundle_without_a_score_graph_still_generates(bundle: Path) -> None:
    backends = {"onnx": toy_backend(toy_settings(score=None))}
    runtime = OnnxRuntime(bundle, toy_manifest(backends=backends, files=list_files(bundle)), threads=1)
    runtime.prefill([5])
    with pytest.raises(InputError, match="no 'score' graph"):
        runtime.score([5])


@pytest.mark.parametrize("version", ["1.28.1", "0.5.0"])
def test_an_onnxruntime_that_is_too_old_is_named(version: str) -> None:
    with pytest.raises(InputError, match=f"onnxruntime {version} is too old, bundles need 1.29 or newer"):
        refuse_older("onnxruntime", version, OLDEST_ONNXRUNTIME)


@pytest.mark.parametrize("version", ["1.29.0", "1.32.0.dev20260101", "2.0", onnxruntime.__version__])
def test_newer_onnxruntimes_are_taken(version: str) -> None:
    refuse_older("onnxruntime", version, OLDEST_ONNXRUNTIME)
