"""Adapters beside a bundle: the same logits as PEFT's, switched without a load, each session with its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.checkpoints import DEMO, hf_model, hf_windowed, make_checkpoint, relative_error
from support.heavy_tail import write_heavy_tailed

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'gemma-edge[onnx]'")

import gemma_edge
from gemma_edge import CalibrationText, ExportOptions, GenerationOptions, InputError, QuantizeOptions, Session
from gemma_edge.export.adapter.make import AdapterOptions, make_adapter
from gemma_edge.export.gate.again import VerifyOptions, verify_bundle
from gemma_edge.runtimes.engines.adapter import ADAPTER, Adapter
from gemma_edge.runtimes.engines.base import Runtime

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT, CHUNK, WINDOW = 24, 7, 8
IDS = torch.randint(3, 320, (61,), generator=torch.Generator().manual_seed(4))


def trained(model: Path, out: Path, seed: int, strength: float = 0.1, **options: object) -> PeftModel:
    """Save a random adapter as PEFT does."""
    torch.manual_seed(seed)
    peft = get_peft_model(hf_model(model), LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, **options}))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:  # the halves B are zero before training
                parameter.add_(torch.randn_like(parameter), alpha=strength)
    peft.save_pretrained(str(out))
    return peft


def bundle_of(model: Path, out: Path, **quantization: object) -> Path:
    gemma_edge.export(
        ExportOptions(
            str(model),
            out=out,
            quantization=QuantizeOptions(**quantization),  # type: ignore[arg-type]
            context=CONTEXT,
            prefill_chunk=CHUNK,
            backend="onnx",
            verify="none",
        )
    )
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 2 with a window shorter than the sequence."""
    return make_checkpoint(tmp_path_factory.mktemp("model"), sliding_window=WINDOW)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle in float32."""
    return bundle_of(model, tmp_path_factory.mktemp("plain") / "bundle", bits=32)


@pytest.fixture(scope="module")
def adapters(model: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the float bundle: one changes every linear, the other two kinds of them with another rank."""
    place = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "all": {"target_modules": EVERYTHING},
        "some": {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 5},
    }
    for seed, (name, options) in enumerate(kinds.items()):
        trained(model, place / f"{name}-peft", seed, **options)
        options_ = AdapterOptions(place / f"{name}-peft", plain, place / name, reference=str(model), factors="float32")
        assert make_adapter(options_).manifest.verification is not None
    return {name: place / name for name in kinds}


def chunked(runtime: Runtime) -> torch.Tensor:
    """Logits of every token of IDS, in uneven chunks past window and context."""
    runtime.reset()
    rows, start = [], 0
    for size in (5, 1, 7, 3, 1, 7, 7, 2, 7, 7, 7, 7):
        rows.append(runtime.decode_many(IDS[start : start + size].tolist()))
        start += size
    assert start == len(IDS)
    return torch.from_numpy(np.concatenate(rows))


def reference(model: Path, peft: Path) -> torch.Tensor:
    merged = PeftModel.from_pretrained(hf_model(model), str(peft)).merge_and_unload()
    return hf_windowed(merged, IDS, local_window=WINDOW, global_window=CONTEXT)


@pytest.mark.parametrize("name", ["all", "some"])
def test_logits_equal_pefts(model: Path, plain: Path, adapters: dict[str, Path], name: str) -> None:
    found = chunked(gemma_edge.load(plain, adapter=adapters[name]))
    expected = reference(model, adapters[name].with_name(f"{name}-peft"))
    assert relative_error(found, expected) <= 1e-4
    assert relative_error(found, chunked(gemma_edge.load(plain))) > 0.01  # the adapter does something


def test_switching_gives_what_each_gives_alone(plain: Path, adapters: dict[str, Path]) -> None:
    alone = {name: chunked(gemma_edge.load(plain, adapter=folder)) for name, folder in adapters.items()}
    base = chunked(gemma_edge.load(plain))
    opened = {name: Adapter.open(folder) for name, folder in adapters.items()}
    runtime = gemma_edge.load(plain)
    for name in ("all", "some", "all"):
        runtime.use_adapter(opened[name])
        assert torch.equal(chunked(runtime), alone[name])
    runtime.use_adapter(None)
    assert torch.equal(chunked(runtime), base)


def test_a_switch_begins_anew_and_loads_nothing(plain: Path, adapters: dict[str, Path]) -> None:
    runtime = gemma_edge.load(plain, adapter=adapters["all"])
    graph = runtime._loaded.session  # type: ignore[attr-defined]
    identity = runtime.identity
    runtime.prefill([5, 6])
    runtime.use_adapter(runtime.adapter)
    assert runtime.position == 2  # the same one: nothing to do
    runtime.use_adapter(Adapter.open(adapters["some"]))
    assert runtime.position == 0 and runtime.identity != identity
    assert runtime._loaded.session is graph  # type: ignore[attr-defined]


def test_a_state_belongs_to_its_adapter(plain: Path, adapters: dict[str, Path]) -> None:
    runtime = gemma_edge.load(plain, adapter=adapters["all"])
    runtime.prefill(IDS[:9].tolist())
    state, following = runtime.snapshot(), runtime.decode(7)
    runtime.use_adapter(None)
    with pytest.raises(InputError, match="belongs to another bundle or backend"):
        runtime.restore(state)
    runtime.use_adapter(Adapter.open(adapters["all"]))
    runtime.restore(state)
    assert np.array_equal(runtime.decode(7), following)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with outlier channels, which awq moves between the weights."""
    folder = tmp_path_factory.mktemp("outliers")
    write_heavy_tailed(DEMO, folder / "model", seed=3)
    return folder / "model"


def test_the_factors_follow_the_scales_that_calibration_moves(outliers: Path, tmp_path: Path) -> None:
    text = CalibrationText(tokens=1024)
    base = bundle_of(outliers, tmp_path / "bundle", bits=4, method="awq+gptq", calibration_text=text)
    trained(outliers, tmp_path / "peft", 0, strength=0.02, target_modules=EVERYTHING)
    options = AdapterOptions(tmp_path / "peft", base, tmp_path / "adapter", reference=str(outliers), factors="int8")
    result = make_adapter(options).manifest.verification
    alone = verify_bundle(VerifyOptions(base, reference=str(outliers))).results["onnx"]
    assert result is not None and result.passed and result.past_wrap
    assert result.quality.kl < 1.5 * alone.quality.kl + 0.005
    with pytest.raises(InputError, match="factors need the original"):
        make_adapter(replace(options, reference=None, force=True))


def test_what_cannot_be_switched_is_refused_by_name(
    model: Path, plain: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    trained(model, tmp_path / "table", 0, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(InputError, match=r"changes model\.embed_tokens: only updates of the layers' linears"):
        make_adapter(AdapterOptions(tmp_path / "table", plain, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    other = bundle_of(model, tmp_path / "other", bits=8)
    with pytest.raises(InputError, match="was made for another bundle"):
        gemma_edge.load(other, adapter=adapters["all"])
    with pytest.raises(InputError, match="not an adapter of a bundle: no adapter.json"):
        gemma_edge.load(plain, adapter=model)


def test_a_damaged_adapter_is_refused(plain: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for name in ("factors.safetensors", "generate.onnx", ADAPTER):
        place = tmp_path / name
        place.mkdir()
        for path in adapters["all"].iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        damaged = (place / name).read_bytes()
        (place / name).write_bytes(damaged[: len(damaged) // 2])
        with pytest.raises(InputError):
            gemma_edge.load(plain, adapter=place)
    manifest = json.loads((adapters["all"] / ADAPTER).read_text())
    (place / ADAPTER).write_text(json.dumps({**manifest, "graphs": {"generate": "../../secret"}}))
    with pytest.raises(InputError, match="outside"):
        gemma_edge.load(plain, adapter=place)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A chat bundle of the demo, and two adapters of it."""
    place = tmp_path_factory.mktemp("demo")
    base = bundle_of(DEMO, place / "bundle", bits=8)
    for seed in (0, 1):
        trained(DEMO, place / f"peft-{seed}", seed, target_modules=EVERYTHING)
        make_adapter(AdapterOptions(place / f"peft-{seed}", base, place / f"adapter-{seed}", level="none"))
    return base, [place / "adapter-0", place / "adapter-1"]


def test_sessions_with_different_adapters_interleave(demo: tuple[Path, list[Path]]) -> None:
    """Each says what it says alone, if that also feeds the whole conversation in every turn: other chunks round differently."""
    base, folders = demo
    options = GenerationOptions(max_tokens=8)
    turns = ["Who is there?", "Tell me more.", "And then?"]

    def answers(session: Session) -> Iterator[list[str]]:
        for turn in turns:
            session.runtime.reset()
            yield list(session.send(turn))

    alone = [list(answers(Session.open(base, options, adapter=folder))) for folder in folders]
    assert alone[0] != alone[1]
    first = Session.open(base, options, adapter=folders[0])
    second = Session(first.runtime, first.tokenizer, first.template, options, adapter=Adapter.open(folders[1]))
    for turn, expected in zip(turns, zip(*alone, strict=True), strict=True):
        assert (list(first.send(turn)), list(second.send(turn))) == expected


def test_a_saved_conversation_goes_on_with_its_adapter(demo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = demo
    options = GenerationOptions(max_tokens=8)
    session = Session.open(base, options, adapter=folders[0])
    list(session.send("Who is there?"))
    other = Session(session.runtime, session.tokenizer, session.template, options, adapter=Adapter.open(folders[1]))
    list(other.send("Who is there?"))
    session.save(tmp_path / "state")  # the runtime holds the other conversation
    expected = list(session.send("And then?"))
    again = Session.open(base, options, adapter=folders[0])
    again.restore(tmp_path / "state")
    assert list(again.send("And then?")) == expected
    with pytest.raises(InputError, match="belongs to another bundle or backend"):
        Session.open(base, options, adapter=folders[1]).restore(tmp_path / "state")


def test_backends_without_adapters_say_so(tmp_path: Path, demo: tuple[Path, list[Path]]) -> None:
    pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: pip install 'gemma-edge[tflite]'")
    base, folders = demo
    out = tmp_path / "tflite"
    gemma_edge.export(ExportOptions(str(DEMO), out=out, backend="tflite", verify="none"))
    with pytest.raises(InputError, match="the tflite backend takes no adapters"):
        gemma_edge.load(out, adapter=folders[0])
    with pytest.raises(InputError, match="adapters are switched by the onnx backend alone"):
        make_adapter(AdapterOptions(folders[0].with_name("peft-0"), out, tmp_path / "adapter"))


def test_the_server_answers_as_the_named_adapter(demo: tuple[Path, list[Path]]) -> None:
    pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    from support.serving import in_a_thread

    from gemma_edge.runtimes.serve.engine import Engine

    base, folders = demo
    opened = [Adapter.open(folder) for folder in folders]
    options = GenerationOptions(max_tokens=8)
    engine = Engine(gemma_edge.load(base), options, adapters=opened)
    with in_a_thread(engine) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        names = [model.id for model in client.models.list()]
        assert names == [engine.name, f"{engine.name}:peft-0", f"{engine.name}:peft-1"]
        for _ in range(2):
            for name, folder in zip(names, (None, *folders), strict=True):
                messages: Any = [{"role": "user", "content": "Who is there?"}]
                answer = client.chat.completions.create(model=name, messages=messages)
                alone = Session.open(base, options, adapter=folder).send("Who is there?")
                assert (answer.model, answer.choices[0].message.content) == (name, "".join(alone))
        with pytest.raises(openai.BadRequestError, match="is not served here; there are"):
            client.chat.completions.create(model=f"{engine.name}:other", messages=messages)
    with pytest.raises(InputError, match="two adapters have the same name"):
        Engine(gemma_edge.load(base), options, adapters=[opened[0], opened[0]])
