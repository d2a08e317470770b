"""Rewinding, aligning, saving and restoring on ONNX Runtime's own cache: exact whatever lies between."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.rewinding import uninterrupted, worst_error
from support.toys import CHUNK, VOCAB, ToyRuntime, toy_logits, write_toy_bundle

import gemma_edge
from gemma_edge.bundle.manifest import MANIFEST, Manifest, with_identities
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines import base
from gemma_edge.runtimes.engines.onnx import OnnxRuntime
from gemma_edge.runtimes.engines.state import read_state, write_state

IDS = [int(token) for token in np.random.default_rng(3).integers(7, VOCAB, 60)]
DTYPES = ["float32", "int8"]


@pytest.fixture(scope="module", params=DTYPES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("rewind") / request.param, dtype=request.param)


@pytest.fixture
def runtime(bundle: Path) -> OnnxRuntime:
    runtime = gemma_edge.load(bundle, threads=1)
    assert isinstance(runtime, OnnxRuntime)
    return runtime


def test_every_rewind_around_every_boundary_is_exact(runtime: OnnxRuntime) -> None:
    worst, free, again = worst_error(runtime, IDS, range(44), range(1, 22))
    assert worst < 1e-3  # logits of deviation 6; other orders of additions
    assert free > 150 and again > 150


def test_an_eviction_in_between_would_be_noticed(runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk above sees what a cache gives that is trusted too far: it is wrong, and nothing says so."""
    monkeypatch.setattr(OnnxRuntime, "_holds", lambda self, position, written: True)
    worst, _, _ = worst_error(runtime, IDS, range(8, 20), range(1, 12))
    assert worst > 1


def test_a_rewind_beyond_what_is_remembered_is_refused_and_one_within_is_exact(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ids that the cache can depend on are kept, so that a text of a million tokens takes no more memory."""
    monkeypatch.setattr(runtime, "_max_remembered", runtime.reach + 10)
    expected = uninterrupted(runtime, IDS)
    assert len(runtime.ids) <= 2 * (runtime.reach + 10) < len(IDS)
    with pytest.raises(InputError, match=r"cannot rewind 40 tokens: the last \d+ are remembered"):
        runtime.rewind(40)
    assert runtime.position == len(IDS)
    runtime.rewind(15)
    assert runtime.stats.refed_tokens > 0
    assert np.abs(runtime.prefill([IDS[45]]) - expected[45]).max() < 1e-3


@pytest.mark.parametrize("count", [-1, 4])
def test_a_rewind_before_the_beginning_is_refused(runtime: OnnxRuntime, count: int) -> None:
    runtime.prefill(IDS[:3])
    with pytest.raises(InputError, match=rf"cannot rewind {count} tokens: 3 were fed"):
        runtime.rewind(count)


def test_decode_many_gives_the_logits_of_every_token(runtime: OnnxRuntime) -> None:
    expected = uninterrupted(runtime, IDS)
    runtime.reset()
    runtime.prefill(IDS[:20])
    assert np.abs(runtime.decode_many(IDS[20:31]) - expected[20:31]).max() < 1e-3
    runtime.prepare_decode_many()
    assert np.abs(runtime.prefill(IDS[31:38]) - expected[37]).max() < 1e-3
    assert np.abs(runtime.decode(IDS[38]) - expected[38]).max() < 1e-3


def test_align_keeps_the_common_beginning_and_leaves_a_token_to_feed(runtime: OnnxRuntime) -> None:
    runtime.prefill(IDS[:12])
    assert runtime.align(IDS[:30]) == runtime.position == 12
    assert runtime.align([*IDS[:9], 5, 6]) == runtime.position == 9
    assert runtime.align(IDS[:9]) == runtime.position == 8
    assert runtime.align([5, 6]) == runtime.position == 0
    assert runtime.ids == []


def test_align_beyond_what_is_remembered_trusts_only_what_the_cache_depends_on(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_max_remembered", runtime.reach + 10)
    runtime.prefill(IDS[:58])
    first = 58 - len(runtime.ids)
    assert first > 0
    assert runtime.align(IDS) == 58
    assert runtime.align([*IDS[: first + runtime.reach - 1], 5, 6, 7]) == 0


@pytest.mark.parametrize("end", [1, 5, 9, 13, 14, 40])
def test_a_restored_state_gives_the_same_bits(bundle: Path, end: int, tmp_path: Path) -> None:
    first, second = gemma_edge.load(bundle, threads=1), gemma_edge.load(bundle, threads=1)
    first.prefill([*IDS[:end], 9])
    first.rewind(1)
    path = tmp_path / "state"
    write_state(path, first.snapshot(), {"note": "é"})
    second.prefill(IDS[40:])  # another text, which must leave no trace
    state, notes = read_state(path)
    second.restore(state)
    assert notes == {"note": "é"}
    assert (second.position, second.ids) == (end, IDS[:end])
    for token in IDS[end : end + 15]:
        assert np.array_equal(first.decode(token), second.decode(token))
    assert second.stats.refed_tokens == 0
    assert [other.name for other in tmp_path.iterdir()] == ["state"]


def test_a_state_is_no_larger_than_what_is_in_use(runtime: OnnxRuntime) -> None:
    runtime.prefill(IDS[:5])
    rows = runtime.snapshot().rows
    assert {array.shape[-2] for array in rows.values()} == {5}


def test_a_state_without_reachable_buffers_is_fed_again() -> None:
    """A backend that gives no way into its cache."""
    first, second = ToyRuntime(), ToyRuntime()
    first.prefill(IDS[: 3 * CHUNK])
    second.restore(first.snapshot())
    assert second.stats.refed_tokens == 3 * CHUNK
    assert np.array_equal(first.decode(9), second.decode(9))


def test_another_bundles_state_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = Manifest.load(copy)
    other_graph = replace(manifest.files["score.onnx"], sha256="0" * 64)
    changed = with_identities(replace(manifest, files={**manifest.files, "score.onnx": other_graph}))
    (copy / MANIFEST).write_text(changed.to_json())
    ours, other = gemma_edge.load(bundle, threads=1), gemma_edge.load(copy, threads=1)
    ours.prefill(IDS[:5])
    other.prefill(IDS[:3])
    with pytest.raises(InputError, match="the state belongs to another bundle or backend"):
        other.restore(ours.snapshot())
    assert other.position == 3


def test_a_damaged_or_foreign_state_file_is_one_line(runtime: OnnxRuntime, tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(InputError, match="is not a file"):
        read_state(path)
    runtime.prefill(IDS[:5])
    write_state(path, runtime.snapshot(), {})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\0" * 200):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            read_state(path)
    shutil.copy(Path(base.__file__), path)
    with pytest.raises(InputError, match="is damaged"):
        read_state(path)
    path.write_bytes(whole.replace(b'position\\": 5', b'position\\": 4'))
    with pytest.raises(InputError, match="its bytes were changed"):
        read_state(path)
    path.write_bytes(whole.replace(b"sha256", b"sha257"))
    with pytest.raises(InputError, match="its bytes were changed"):
        read_state(path)
    write_state(path, replace(runtime.snapshot(), position=4), {})
    with pytest.raises(InputError, match="state is damaged: 5 ids, position 4 of 5"):
        runtime.restore(read_state(path)[0])
    with pytest.raises(InputError, match="cannot write .*name a file in a folder"):
        write_state(tmp_path / "missing" / "state", runtime.snapshot(), {})


def test_an_interrupted_forward_pass_leaves_an_empty_runtime(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    runtime.prefill(IDS[:5])
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.prefill(IDS[5:7])
    assert (runtime.position, runtime.ids) == (0, [])
    assert runtime.prefill(IDS[:9]).argmax() == toy_logits(IDS[:9])[-1].argmax()
