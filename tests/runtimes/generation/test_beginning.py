"""What a chat pins: all that stands before the user's own words, and nothing else. The logits: engines/test_pinned.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import DEMO
from support.toys import VOCAB, toy_manifest

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.tools.tool import Tool
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

PREFIX = "Be kind. "
SHORT = GenerationOptions(max_tokens=9)
LIGHT = Tool("light", "Switches the light.", {"type": "object", "properties": {"on": {"type": "boolean"}}})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, in float; its context is soon full. Of what it could keep this is the default."""
    options = ExportOptions(
        model=str(DEMO),
        out=tmp_path_factory.mktemp("beginning") / "bundle",
        target="desktop",
        quantization=QuantizeOptions(bits=32),
        context=48,
        prefill_chunk=7,
        backend="onnx,tflite",
        verify="none",
    )
    return pipeline.export(options).bundle


@pytest.fixture(params=["onnx", "tflite"])
def runtime(request: pytest.FixtureRequest, bundle: Path) -> Runtime:
    return gemma_edge.load(bundle, backend=request.param, threads=1)


def session_of(runtime: Runtime, notes: list[str] | None = None, **options: Any) -> Session:
    """A chat of the runtime's bundle; what it has to say goes to `notes`."""
    tokenizer, template = Tokenizer(runtime.bundle, runtime.manifest), ChatTemplate.from_bundle(runtime.bundle)
    return Session(runtime, tokenizer, template, SHORT, notify=(notes if notes is not None else []).append, **options)


def talk(session: Session, turns: int) -> list[int]:
    """All tokens of a conversation of so many turns."""
    for number in range(turns):
        list(session.send(f"And what of the sea, number {number}?"))
    return list(session.ids)


def test_a_long_chat_keeps_its_prefix_and_no_word_of_the_user(runtime: Runtime) -> None:
    session = session_of(runtime, prefix=PREFIX)
    ids = talk(session, 4)
    assert len(ids) > 2 * runtime.cache.context
    said = session.tokenizer.decode(ids[: runtime.pinned])
    assert said.strip() == f"<start_of_turn>user\n{PREFIX}".strip()
    assert runtime.pinned < runtime.cache.pinned == 12


def test_its_answers_are_those_of_a_text_that_was_pinned_and_fed_at_once(runtime: Runtime) -> None:
    ids = talk(session_of(runtime, prefix=PREFIX), 4)
    pinned, found = runtime.pinned, runtime.decode(ids[0])
    errors = {}
    for pin in (pinned, 0):
        runtime.reset()
        runtime.pin(pin)
        runtime.prefill(ids)
        other = runtime.decode(ids[0])
        errors[pin] = float(np.abs(found - other).max() / np.ptp(other))
    assert errors[pinned] < 1e-4 < 1e-3 < errors[0]  # chunks of other sizes change ONNX Runtime's last bits


def test_it_can_be_left_to_slide(runtime: Runtime) -> None:
    talk(session_of(runtime, prefix=PREFIX, pin_system=False), 4)
    assert runtime.pinned == 0


def test_a_beginning_that_is_too_long_slides_and_is_said_once(runtime: Runtime) -> None:
    notes: list[str] = []
    talk(session_of(runtime, notes, prefix=PREFIX * 9), 4)
    assert runtime.pinned == 0
    told = [note for note in notes if "--pinned" in note]
    assert len(told) == 1


def test_tools_belong_to_the_beginning(bundle: Path) -> None:
    """The prompt's text before the user's words, as `Runtime.pin` would get it."""
    session = Session.open(bundle, backend="onnx", threads=1)
    options = GenerationOptions(max_tokens=1, tools=(LIGHT,))
    plain, with_tools = (
        session._beginning(ids, prompt, each)
        for each in (SHORT, options)
        for prompt in [session._form.render(session.template, [{"role": "user", "content": "Go."}], each.tools)]
        for ids in [session.tokenizer.encode(prompt)]
    )
    assert plain < 8 and with_tools > plain + 20


def test_a_request_pins_the_system_s_message() -> None:
    pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
    from gemma_edge.runtimes.serve.openai import Model, ParsedRequest
    from gemma_edge.runtimes.tools.json_calls import JsonCalls

    model = Model(
        Tokenizer(DEMO, toy_manifest()), ChatTemplate.from_bundle(DEMO), JsonCalls(), VOCAB, context=64, pins=True
    )

    def pinned(*messages: dict[str, str]) -> tuple[int, tuple[int, ...]]:
        request = ParsedRequest.parse(
            {"messages": list(messages)}, chat=True, defaults=GenerationOptions(), model=model
        )
        return request.pinned, request.prompts[0]

    user, system = {"role": "user", "content": "Hello."}, {"role": "system", "content": "Be kind."}
    count, ids = pinned(system, user, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go."})
    text = model.tokenizer.decode(list(ids[:count]))
    assert text.endswith("Be kind.") or text.endswith("Be kind.\n\n")
    assert pinned(user)[0] < count
    with pytest.raises(InputError, match="messages contain no message of a user"):
        pinned(system)
