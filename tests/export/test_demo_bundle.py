"""The demo model through the real pipeline, once: gate, files, genai, predictions, and how bundles defend themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.checkpoints import DEMO

import gemma_edge
from gemma_edge.bundle.manifest import MANIFEST, Manifest, check_hashes, list_files, with_identities
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.onnx.check import check_graph
from gemma_edge.export.onnx.weights import layout
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.options import QuantizeOptions


@pytest.fixture
def copy(demo: Export, tmp_path: Path) -> Iterator[Path]:
    """The bundle, to be damaged."""
    yield Path(shutil.copytree(demo.bundle, tmp_path / "copy"))


def test_gate_passes_on_real_text_past_the_context_and_says_on_what(demo: Export) -> None:
    result = demo.manifest.verification["onnx"]
    assert result.passed and result.level == "quick" and result.past_wrap
    assert result.fed_tokens == 512 + 64 and result.quality.tokens == 575
    assert result.quality.kl < 0.02 and result.quality.top1 > 0.9
    assert result.lowering.kl < 1e-3


def test_manifest_on_disk_is_the_returned_one_and_lists_every_file(demo: Export) -> None:
    manifest = Manifest.load(demo.bundle)
    assert manifest == demo.manifest
    on_disk = {path.name for path in demo.bundle.iterdir()} - {MANIFEST}
    assert set(manifest.files) == on_disk
    check_hashes(demo.bundle, manifest)


def test_weights_file_has_exactly_the_planned_size_and_cache_the_planned_bytes(demo: Export) -> None:
    assert demo.manifest.files["model.onnx.data"].bytes == demo.manifest.backends["onnx"].plan.weights_bytes
    assert demo.manifest.backends["onnx"].cache.bytes == demo.manifest.backends["onnx"].plan.kv_bytes


def test_graphs_beside_the_shared_weights_are_small(demo: Export) -> None:
    for graph in ("generate.onnx", "score.onnx", "genai.onnx"):
        assert demo.manifest.files[graph].bytes < 300_000


def test_genai_gives_the_same_greedy_tokens_from_the_same_folder(demo: Export) -> None:
    """Also for a length below the local window of 128, where the files of genai's own builder fail."""
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    prompt, length = [2, 300, 17, 999, 45], 100
    model = genai.Model(str(demo.bundle))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)]
    runtime = gemma_edge.load(demo.bundle)
    ours, logits = list(prompt), runtime.prefill(prompt)
    while len(ours) < len(theirs):
        ours.append(int(logits.argmax()))
        logits = runtime.decode(ours[-1])
    assert len(theirs) > 20 and ours == theirs


def test_genai_generates_to_the_end_of_the_context(demo: Export) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")
    model = genai.Model(str(demo.bundle))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, min_length=512, max_length=512)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([2, 300, 17])
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)]
    assert len(tokens) == 512
    rows = gemma_edge.load(demo.bundle).score(tokens)
    # With min_length genai bans the stop ids; everything else must be the most likely token of ours, or nearly: where there is no
    # AVX-512, kernels for one row and for several round activations to int8 at other places.
    rows[:, [1, 5]] = -np.inf
    short_of = rows[2:-1].max(-1) - rows[np.arange(2, 511), tokens[3:]]
    assert (short_of == 0).mean() > 0.95 and short_of.max() < 0.2  # of a range of 32


def test_generation_is_int8_in_activations_and_the_head_reads_the_tables_bytes(demo: Export) -> None:
    graph = onnx.load(demo.bundle / "generate.onnx", load_external_data=False).graph
    levels = {
        attribute.i
        for node in graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    places = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer}
    table, head = places["model.embed_tokens.weight_packed"], places["lm_head.weight_packed"]
    assert levels == {4} and table == head and table["location"] == "model.onnx.data"


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("softcap", 0.0, "softcap"),
        ("local_window_size", 127, "local_window_size"),
        ("sliding_window_cache", 0, "sliding_window_cache"),
        ("scale", 0.1, "scale"),
    ],
)
def test_a_wrong_attention_attribute_is_refused_after_lowering(
    demo: Export, copy: Path, attribute: str, value: float, message: str
) -> None:
    path = copy / "generate.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    found = next(a for a in node.attribute if a.name == attribute)
    if isinstance(value, float):
        found.f = value
    else:
        found.i = value
    onnx.save(model, path)
    with pytest.raises(RuntimeError, match=f"layer 0 attends with {message}"):
        check_demo(demo, path)


@pytest.mark.parametrize(
    ("operator", "attribute", "value", "message"),
    [
        (
            "MatMulNBits",
            "block_size",
            16,
            "with block_size 16 reads",
        ),  # divides the group, but its scales are half as many
        ("MatMulNBits", "block_size", 256, "block_size 256, no part of 128"),
        ("MatMulNBits", "bits", 8, "has bits 8, expected 4"),
        ("MatMulNBits", "K", 32, "has K 32"),
        ("GatherBlockQuantized", "block_size", 128, "of model.embed_tokens with block_size 128 reads"),
        ("GatherBlockQuantized", "bits", 4, "has bits 4, expected 8"),
    ],
)
def test_a_wrong_quantization_attribute_is_refused_after_lowering(
    demo: Export, copy: Path, operator: str, attribute: str, value: int, message: str
) -> None:
    path = copy / "generate.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == operator)
    found = next(a for a in node.attribute if a.name == attribute)
    assert found.i != value
    found.i = value
    onnx.save(model, path)
    with pytest.raises(RuntimeError, match=message):
        check_demo(demo, path)


def test_scales_of_another_weight_are_refused_after_lowering(demo: Export, copy: Path) -> None:
    path = copy / "generate.onnx"
    model = onnx.load(path, load_external_data=False)
    gate, up = (
        next(n for n in model.graph.node if f"0.mlp.{kind}_proj" in "".join(n.input)) for kind in ("gate", "up")
    )
    gate.input[2], up.input[2] = up.input[2], gate.input[2]
    onnx.save(model, path)
    with pytest.raises(
        RuntimeError, match=r"gate_proj with block_size 128 reads model.layers.0.mlp.up_proj.weight_scale"
    ):
        check_demo(demo, path)


def check_demo(demo: Export, path: Path) -> None:
    quantized = QuantizedCheckpoint.open(demo.bundle.parent / "checkpoint")
    cache = demo.manifest.backends["onnx"].cache
    blobs = layout(quantized.config, quantized.configs, {}, int8_kv=cache.dtype == "int8")
    check_graph(path, quantized.config, quantized.configs, cache, blobs, windowed=True)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_gate_refuses_a_bundle_whose_weights_were_swapped(demo: Export, copy: Path, tmp_path: Path) -> None:
    """What no look at the graph finds: one layer's bytes in another's place."""
    from gemma_edge.export.gate import limits, verify
    from gemma_edge.model.checkpoint import Checkpoint

    quantized = QuantizedCheckpoint.open(demo.bundle.parent / "checkpoint")
    blobs = {blob.name: blob for blob in layout(quantized.config, quantized.configs, {})}
    first, second = (blobs[f"model.layers.{i}.mlp.up_proj.weight_packed"] for i in (0, 2))
    with (copy / "model.onnx.data").open("r+b") as file:
        parts = []
        for blob in (first, second):
            file.seek(blob.offset)
            parts.append(file.read(blob.nbytes))
        for blob, part in zip((second, first), parts, strict=True):
            file.seek(blob.offset)
            file.write(part)
    # the hashes fit: only what the bundle computes tells it from a good one
    with_identities(replace(Manifest.load(copy), files=list_files(copy))).save(copy)
    gate = verify.make_gate(copy / "tokenizer.json", 4096, 2, 512, "quick")
    allowed = {"onnx": limits.LIMITS[4]}
    references = verify.save_references(made(tmp_path / "gate"), gate, 512, Checkpoint.open(DEMO), quantized)
    result = verify.verify(copy, references, allowed)["onnx"]
    assert not result["passed"] and any(failure.startswith("lowering") for failure in result["failures"])


def test_gate_finds_the_same_whatever_is_scored_at_once(
    demo: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 positions at once: no multiple of the chunk, of the rows that are compared together, or of the lowering text."""
    from gemma_edge.export.gate import judge, limits, verify
    from gemma_edge.model.checkpoint import Checkpoint

    monkeypatch.setattr("gemma_edge.logits.SCORED_BYTES", 4 * 4096 * 50)
    monkeypatch.setattr(verify, "_judge", lambda folder, *rest: judge.judge(folder))
    quantized = QuantizedCheckpoint.open(demo.bundle.parent / "checkpoint")
    gate = verify.make_gate(demo.bundle / "tokenizer.json", 4096, 2, 512, "quick")
    references = verify.save_references(made(tmp_path / "gate"), gate, 512, Checkpoint.open(DEMO), quantized)
    found = verify.verify(demo.bundle, references, {"onnx": limits.LIMITS[4]})["onnx"]
    once = asdict(demo.manifest.verification["onnx"])
    assert found["generation_difference"] == pytest.approx(once["generation_difference"], rel=0.01)
    for part in ("quality", "quality_past_context", "lowering"):
        assert found[part]["tokens"] == once[part]["tokens"]
        assert found[part] == pytest.approx(once[part], rel=0.01)


def test_a_wrap_that_goes_wrong_cannot_hide_among_the_positions_before_it(demo: Export) -> None:
    """63 bad positions among 575 leave the mean within the limits; past the context they are judged on their own."""
    from gemma_edge.export.gate import limits

    result = asdict(demo.manifest.verification["onnx"])
    assert limits.failures(result, limits.LIMITS[4]) == [] and result["quality_past_context"]["tokens"] == 63
    result["quality_past_context"] = {**result["quality_past_context"], "kl": 4.0, "top1": 0.0}
    found = limits.failures(result, limits.LIMITS[4])
    assert [failure.split(":")[0] for failure in found] == ["quality_past_context kl", "quality_past_context 1 - top1"]


def test_a_runtime_that_computes_something_else_cannot_hide_in_a_small_largest_difference(demo: Export) -> None:
    from gemma_edge.export.gate import limits

    result = asdict(demo.manifest.verification["onnx"])
    result["lowering"] = {**result["lowering"], "kl": 0.06}
    assert limits.failures(result, limits.LIMITS[4]) == ["lowering kl: 0.06 > 0.05"]


def _edit_manifest(bundle: Path, **changes: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_edited_file_is_found_by_its_hash(copy: Path) -> None:
    with (copy / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\x01\x02")
    with pytest.raises(InputError, match=r"model.onnx.data was changed: sha256 .* the manifest says"):
        check_hashes(copy, Manifest.load(copy))


def test_truncated_missing_and_foreign_files_are_named_when_the_bundle_is_opened(copy: Path) -> None:
    data = copy / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=rf"model.onnx.data: {len(whole) - 5} bytes, the manifest says {len(whole)}"):
        gemma_edge.load(copy)
    data.unlink()
    with pytest.raises(InputError, match="model.onnx.data is missing"):
        gemma_edge.load(copy)
    _edit_manifest(copy, schema_version=99)
    with pytest.raises(InputError, match="schema_version 99, this gemma-edge reads 3"):
        gemma_edge.load(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        gemma_edge.load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(InputError, match="is not a bundle"):
        gemma_edge.load(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_paths_of_a_manifest_never_leave_the_bundle(copy: Path, name: str) -> None:
    (copy.parent / "secret").write_text("x")
    manifest = json.loads(Manifest.load(copy).to_json())
    files, backend = manifest["files"], manifest["backends"]["onnx"]
    _edit_manifest(copy, files={**files, name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(InputError, match="lies outside the bundle"):
        gemma_edge.load(copy)
    settings = {**backend["settings"], "generate": name}
    _edit_manifest(copy, files=files, backends={"onnx": {**backend, "settings": settings}})
    with pytest.raises(InputError, match="lies outside the bundle"):
        gemma_edge.load(copy)


def test_quantized_checkpoint_goes_in_and_gives_the_same_weights_file(demo: Export, tmp_path: Path) -> None:
    # the bits asked for are those of a float folder: neither the integers nor the name follow them
    given = demo.bundle.parent / "checkpoint"
    again = pipeline.export(
        ExportOptions(model=str(given), quantization=QuantizeOptions(bits=8), out=tmp_path / "again", verify="none")
    )
    assert again.manifest.recipe.name == "int4-g128" == again.manifest.backends["onnx"].plan.recipe
    assert again.manifest.files["model.onnx.data"] == demo.manifest.files["model.onnx.data"]
    assert again.manifest.verification == {}


def test_folder_without_a_tokenizer_gives_a_token_level_bundle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, folder)
    done = pipeline.export(ExportOptions(model=str(folder), out=tmp_path / "out"))
    assert not done.manifest.tokenizer and "token ids, not text" in caplog.text
    assert "random tokens" in done.manifest.verification["onnx"].text
    assert gemma_edge.load(done.bundle).prefill([2, 5, 7]).shape == (4096,)


def test_bundle_and_checkpoint_get_the_same_files_beside_the_weights(tmp_path: Path) -> None:
    """There were two lists of them."""
    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ bos_token }}")
    (model / "added_tokens.json").write_text("{}")
    (model / "tokenizer.json.bak").write_text("no part of a model")
    out, kept = tmp_path / "out", tmp_path / "kept"
    pipeline.export(
        ExportOptions(
            model=str(model), out=out, save_checkpoint=kept, verify="none", quantization=QuantizeOptions(quality="fast")
        )
    )
    for folder in (out, kept):
        found = {path.name for path in folder.iterdir()} & {path.name for path in model.iterdir()}
        assert found - {"config.json", "model.safetensors"} == {
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "added_tokens.json",
            "chat_template.jinja",
            "generation_config.json",
        }


def test_failed_gate_publishes_nothing_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_edge.export.gate import limits

    monkeypatch.setitem(limits.LIMITS, 4, replace(limits.LIMITS[4], kl=1e-9))
    options = ExportOptions(model=str(DEMO), out=tmp_path / "out", quantization=QuantizeOptions(quality="fast"))
    with pytest.raises(InputError, match="differs too much from the original .onnx: quality kl: "):
        pipeline.export(options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="closer are `?quality`? best, .*; it lies in"):
        pipeline.export(replace(options, keep_failed=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    first = Manifest.load(tmp_path / "out.failed")
    assert first.verification["onnx"].passed is False
    # what was kept to be looked at is not replaced unasked, and that is said before any work
    monkeypatch.setattr(pipeline, "make_checkpoint", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(InputError, match=r"out.failed exists; pass force"):
        pipeline.export(replace(options, keep_failed=True))
    monkeypatch.undo()
    assert Manifest.load(tmp_path / "out.failed") == first
    monkeypatch.setitem(limits.LIMITS, 4, replace(limits.LIMITS[4], kl=1e-9))
    with pytest.raises(InputError, match="it lies in"):
        pipeline.export(replace(options, keep_failed=True, force=True, prefill_chunk=64))
    assert Manifest.load(tmp_path / "out.failed").backends["onnx"].cache.prefill_chunk == 64
