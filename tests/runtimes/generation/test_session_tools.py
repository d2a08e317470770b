"""A conversation in which the model calls functions: the calls, their results, and what the cache then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.toys import ToyRuntime, toy_manifest

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.tools.tool import Tool
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

WEATHER = Tool(
    "weather",
    "The weather of a city.",
    {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
)
TIME = Tool("time")


def session(**choices: Any) -> Session:
    options = GenerationOptions(**{"max_tokens": 60, "tools": (WEATHER, TIME), "tool_choice": "required", **choices})
    return Session(ToyRuntime(), Tokenizer(DEMO, toy_manifest()), ChatTemplate.from_bundle(DEMO), options)


def test_five_turns_of_calls_and_results() -> None:
    chat = session()
    assert "".join(chat.send("Is it warm?")) == "", "calls are no text"
    for turn in range(4):
        assert chat.calls and all(call.name in ("weather", "time") for call in chat.calls)
        results = [{"degrees": 20 + turn} for _ in chat.calls]
        assert "".join(chat.reply(results)) == ""
    text = chat.tokenizer.decode(chat.ids)
    assert text.count('{"degrees":20}') == len([m for m in chat.messages if m["content"] == '{"degrees":20}'])
    assert chat.runtime.resets == 0  # type: ignore[attr-defined]


def test_the_tools_come_first_in_the_first_turn_and_results_in_a_turn_of_the_user() -> None:
    chat = session(tool_choice="time")
    list(chat.send("What time is it?"))
    list(chat.reply(["noon"]))
    text = chat.tokenizer.decode(chat.ids)
    offer, _, rest = text.partition("What time is it?")
    assert "You have access to functions." in offer and '"name":"weather"' in offer and '["Rome","Oslo"]' in offer
    call = '[{"name":"time","parameters":{}}]'
    assert rest.startswith(
        f"<end_of_turn>\n<start_of_turn>model\n{call}<end_of_turn>\n<start_of_turn>user\n```tool_output\nnoon\n```"
    )


def test_the_conversation_holds_calls_and_results() -> None:
    chat = session(tool_choice="time")
    list(chat.send("What time is it?"))
    (call,) = chat.calls
    said = chat.messages[-1]
    assert said == {"role": "assistant", "content": "", "tool_calls": [call.as_json()]}
    "".join(chat.reply(["noon"], GenerationOptions(max_tokens=5)))
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[2] == {"role": "tool", "name": "time", "content": "noon"} and chat.calls == ()


def test_a_turn_taken_back_waits_for_its_results_again(tmp_path: Path) -> None:
    chat = session(tool_choice="time")
    list(chat.send("What time is it?"))
    (call,) = chat.calls
    list(chat.reply(["noon"], GenerationOptions(max_tokens=5)))
    chat.rewind()
    assert list(chat.calls) == [call]
    chat.save(tmp_path / "state")
    other = session()
    other.runtime = chat.runtime
    other.restore(tmp_path / "state")
    assert list(other.calls) == [call] and other.messages == chat.messages
    chat.reset()
    assert not chat.calls


@pytest.mark.parametrize("results", [[], ["a", "b"]])
def test_every_call_gets_one_result(results: list[str]) -> None:
    chat = session(tool_choice="time")
    list(chat.send("What time is it?"))
    with pytest.raises(
        InputError, match=f"holds 1 calls, and {len(results)} results were given; give one result for each"
    ):
        chat.reply(results)
    assert len(chat.messages) == 2
