"""A bundle as one file for LiteRT-LM: its own engine, unmodified, must say what transformers says."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import DEMO, SHAPES, TEXTS, hf_model, make_checkpoint, write_manifest
from support.toys import GEMMA3_TEMPLATE

pytest.importorskip(
    "litert_lm_builder", reason="litert-lm-builder is not installed: pip install 'gemma-edge[litertlm]'"
)
pytest.importorskip("litert_lm", reason="litert-lm-api is not installed")

import litert_lm
from litert_lm_builder import litertlm_peek

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.export.backend import LoweringTask
from gemma_edge.export.cli import main
from gemma_edge.export.plan import geometry
from gemma_edge.export.tflite.backend import LITERT
from gemma_edge.export.tflite.litertlm import turns_of, write_litertlm
from gemma_edge.model.hub import copy_companions
from gemma_edge.quantize.checkpoint.store import open_weights
from gemma_edge.quantize.checkpoint.writer import write_quantized
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.text.chat import GEMMA2_TEMPLATE, ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

CHUNK, CONTEXT = 16, 384  # the demo's local layers: a window of 128, a ring of 143 slots
SHORT = "And the LORD said unto"
LONG = "".join((TEXTS / "heldout_kjv.txt").read_text().splitlines(keepends=True)[:8])
NEW = 24  # tokens


def make_bundle(model: Path, out: Path) -> Path:
    """A tflite bundle that takes text."""
    source, recipe = open_weights(model), make_recipe(32)
    quantized = write_quantized(source, recipe, out / "checkpoint")
    (out / "bundle").mkdir()
    cache = geometry(source.config, CONTEXT, CHUNK, backend="tflite")
    entry = LITERT.lower(LoweringTask(quantized, cache, out / "bundle"))
    copy_companions(model, out / "bundle")
    write_manifest(out / "bundle", source.config, recipe, cache, {"tflite": entry}, tokenizer=True)
    return out / "bundle"


@contextmanager
def engine_of(bundle: Path) -> Iterator[Any]:
    """LiteRT-LM's engine with a bundle as one file."""
    out = bundle.parent / "model.litertlm"
    write_litertlm(bundle, out)
    made = litert_lm.Engine(str(out), litert_lm.Backend.CPU(), cache_dir=str(bundle.parent))
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(DEMO, tmp_path_factory.mktemp("litertlm"))


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Any]:
    with engine_of(bundle) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.of_folder(DEMO, open_weights(DEMO).config)


def greedy(ids: list[int], stop: frozenset[int] = frozenset(), folder: Path = DEMO) -> list[int]:
    """What transformers goes on with."""
    model, given = hf_model(folder), len(ids)
    while len(ids) < given + NEW:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            break
        ids = [*ids, token]
    return ids[given:]


GREEDY = {"top_k": 1, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def said_after(engine: Any, prompt: str) -> str:
    """What the engine goes on with."""
    config = litert_lm.SamplerConfig(**GREEDY)
    with engine.create_session(apply_prompt_template=False, sampler_config=config, max_output_tokens=NEW) as session:
        session.run_prefill([prompt])
        (text,) = session.run_decode().texts
    return str(text)


def test_a_model_of_the_cpu_is_not_for_the_engines_gpu(bundle: Path, tmp_path: Path) -> None:
    """There it answered `<pad>` over and over, without an error: the engine was told nothing."""
    plain, accelerated = tmp_path / "plain.litertlm", tmp_path / "accelerated.litertlm"
    write_litertlm(bundle, plain)
    manifest = Manifest.load(bundle)
    entry = manifest.backends["tflite"]
    on_gpu = replace(entry, accelerator="gpu", plan=replace(entry.plan, accelerator="gpu"))
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    replace(manifest, backends={"tflite": on_gpu}).save(copy)
    write_litertlm(copy, accelerated)
    described = {path: facts_of(path) for path in (plain, accelerated)}
    assert described[plain] == {"model_type": "tf_lite_prefill_decode", "backend_constraint": "cpu"}
    assert described[accelerated] == {"model_type": "tf_lite_prefill_decode", "prefer_activation_type": "fp32"}


def facts_of(path: Path) -> dict[str, str]:
    """What a file tells the engine of its model."""
    sections = litertlm_peek.read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
    every = [sections.Objects(index) for index in range(sections.ObjectsLength())]
    (model,) = (each for each in every if litertlm_peek.get_model_type(each) is not None)
    facts = [litertlm_peek.kvp_to_dict(model.Items(index)) for index in range(model.ItemsLength())]
    return {fact["key"]: fact["value"] for fact in facts}


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "longer than the ring"])
def test_official_engine_goes_on_as_transformers(engine: Any, tokenizer: Tokenizer, prompt: str) -> None:
    ids = tokenizer.encode(prompt)
    assert len(ids) < 20 or 180 < len(ids) < CONTEXT - NEW, "one shorter, the other longer than a local layer's ring"
    text = said_after(engine, prompt)
    assert text == tokenizer.decode(greedy(ids)) and len(text) > NEW


@pytest.mark.parametrize("shape", ["gemma1_one_head", "gemma3_scaled"])
def test_official_engine_goes_on_as_transformers_with_other_families(shape: str, tmp_path: Path) -> None:
    """Random weights and the demo's tokenizer. A head of its own keeps the model from repeating one token."""
    vocabulary = open_weights(DEMO).config.vocab_size
    folder = make_checkpoint(
        tmp_path / "model", **{**SHAPES[shape], "vocab_size": vocabulary, "tie_word_embeddings": False}
    )
    copy_companions(DEMO, folder)
    tokenizer = Tokenizer.of_folder(folder, open_weights(folder).config)
    expected = greedy(tokenizer.encode(SHORT), tokenizer.stop_ids, folder)
    assert len(set(expected)) > NEW // 2
    with engine_of(make_bundle(folder, tmp_path)) as engine:
        # the engine's answer is a C string, which ends before a token of the byte 0
        assert said_after(engine, SHORT) == tokenizer.decode(expected).partition("\0")[0]


def test_official_engine_holds_a_conversation_as_the_template_says(engine: Any, tokenizer: Tokenizer) -> None:
    """Two turns: the second begins at any slot, and in the middle of a chunk."""
    template, ids, answers = ChatTemplate.from_bundle(DEMO), [2], []
    config = litert_lm.SamplerConfig(**GREEDY)
    with engine.create_conversation(sampler_config=config, max_output_tokens=NEW) as conversation:
        for said in ("Call me Ishmael. Some years ago", "It is a truth universally acknowledged, that"):
            answers.append(conversation.send_message(said)["content"][0]["text"])
            # an answer that was cut short is not closed: the engine's own way, whatever the model
            turn = template.render([{"role": "user", "content": said}]).removeprefix(template.bos)
            ids += tokenizer.encode(turn, bos=False)
            expected = greedy(ids, tokenizer.stop_ids)
            assert answers[-1] == tokenizer.decode(expected)
            ids += expected
    assert answers[0] != answers[1]


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def test_a_template_is_taken_apart_into_what_stands_around_each_turn() -> None:
    for source in (GEMMA2_TEMPLATE, GEMMA3_TEMPLATE):
        template = ChatTemplate(source, {"bos_token": "<bos>"})
        before, after, opening, closing = turns_of(template)
        assert template.render(TURNS) == f"<bos>{before}a{after}{opening}b{closing}{before}c{after}{opening}"
    counting = GEMMA2_TEMPLATE.replace("'<start_of_turn>'", "'<start_of_turn>' + loop.index | string")
    with pytest.raises(InputError, match="more than what stands before and after"):
        turns_of(ChatTemplate(counting, {"bos_token": "<bos>"}))


def test_command_writes_the_file_once(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.litertlm"
    command = ["litertlm", str(bundle), "-o", str(out)]
    assert CliRunner().invoke(main, command).exit_code == 0
    before = out.read_bytes()
    assert before[:8] == b"LITERTLM" and len(before) > (bundle / "model.tflite").stat().st_size
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2 and "--force" in again.output
    assert CliRunner().invoke(main, [*command, "--force"]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_what_litertlm_cannot_take_is_refused(bundle: Path, tmp_path: Path) -> None:
    config, cache = open_weights(DEMO).config, geometry(open_weights(DEMO).config, CONTEXT, CHUNK)
    onnx = {"generate": "model", "score": None, "genai": None, "weights": None}
    cases = {
        "onnx": ("onnx", {**onnx, "accuracy_level": 0, "min_onnxruntime": "1.29"}, "no tflite"),
        "mute": (
            "tflite",
            {**asdict(Manifest.load(bundle).backends["tflite"].settings), "program": "model"},
            "no tokenizer",
        ),
    }
    for name, (backend, settings, said) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_bytes(b"")
        write_manifest(tmp_path / name, config, make_recipe(32), cache, {backend: settings})
        with pytest.raises(InputError, match=said):
            write_litertlm(tmp_path / name, tmp_path / "out.litertlm")
    with pytest.raises(InputError, match="cannot write"):
        write_litertlm(bundle, tmp_path / "nowhere" / "out.litertlm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mute", "onnx"]
