"""Tools over HTTP: real clients call functions for five turns, and what is wrong gets one sentence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import CHAT, COMPLETIONS, ask, in_a_thread, send

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

import jsonschema

WEATHER = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
SCHEMAS = {"weather": WEATHER, "add": ADD}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": schema, "strict": True},
    }
    for name, schema in SCHEMAS.items()
]
HELLO: list[Any] = [{"role": "user", "content": "Hello."}]
HOT = {"temperature": 5, "max_tokens": 120}


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_a_loop_of_five_turns_by_openais_client(client: Any) -> None:
    messages = [*HELLO]
    for turn in range(5):
        asked = {"model": "any", "messages": messages, "tools": TOOLS, "tool_choice": "required", "seed": turn, **HOT}
        (choice,) = client.chat.completions.create(**asked).choices
        assert choice.finish_reason in ("tool_calls", "length") and choice.message.content is None
        assert choice.message.tool_calls
        messages.append(choice.message.model_dump(exclude_none=True))
        for call in choice.message.tool_calls:
            check(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "31"})
    last = client.chat.completions.create(model="any", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=5)
    assert last.choices[0].message.content and not last.choices[0].message.tool_calls
    assert last.choices[0].finish_reason == "length"


def test_calls_come_in_parts_that_are_the_whole_answers(client: Any) -> None:
    asked = {"model": "any", "messages": HELLO, "tools": TOOLS, "tool_choice": "required", "seed": 4, **HOT}
    whole = client.chat.completions.create(**asked).choices[0]
    calls: dict[int, list[str]] = {}
    finish, parts = None, 0
    for event in client.chat.completions.create(**asked, stream=True):
        choice = event.choices[0]
        assert not choice.delta.content
        for part in choice.delta.tool_calls or ():
            if part.index not in calls:
                assert part.id and part.type == "function"
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments
            parts += 1
        finish = choice.finish_reason or finish
    expected = [[call.function.name, call.function.arguments] for call in whole.message.tool_calls]
    assert list(calls.values()) == expected and finish == whole.finish_reason and parts > 2 * len(calls)


def test_several_calls_in_one_answer_unless_they_are_switched_off(client: Any) -> None:
    counts = {True: set[int](), False: set[int]()}
    for parallel, found in counts.items():
        for seed in range(8):
            asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel, "seed": seed}
            answer = client.chat.completions.create(model="any", messages=HELLO, temperature=5, max_tokens=200, **asked)
            found.add(len(answer.choices[0].message.tool_calls))
    assert counts[False] == {1} and max(counts[True]) > 1


def test_a_named_function_is_called_and_text_is_possible_without_one(port: int) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    answer = ask(port, CHAT, messages=HELLO, tools=TOOLS, tool_choice=named, **HOT)["choices"][0]
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["add"]
    text = ask(port, CHAT, messages=HELLO, tools=TOOLS, max_tokens=4)["choices"][0]
    assert (
        text["message"] == {"role": "assistant", "content": text["message"]["content"]} and text["message"]["content"]
    )


def test_a_tool_loop_by_openai_agents(port: int) -> None:
    agents = pytest.importorskip("agents", reason="the package openai-agents is not installed")
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    agents.set_tracing_disabled(True)
    seen: list[tuple[str, object]] = []

    def weather(city: str) -> str:
        """The weather of a city."""
        seen.append(("weather", city))
        return "31 degrees"

    def add(a: int, b: int) -> int:
        """The sum of two numbers."""
        seen.append(("add", a + b))
        return a + b

    turns = 0

    def enough(context: object, results: object) -> Any:
        nonlocal turns
        turns += 1
        return agents.ToolsToFinalOutputResult(is_final_output=turns == 5, final_output="done" if turns == 5 else None)

    model = agents.OpenAIChatCompletionsModel(
        model="any",
        openai_client=openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0),
    )
    agent = agents.Agent(
        name="tester",
        instructions="Be brief.",
        model=model,
        tools=[agents.function_tool(weather), agents.function_tool(add)],
        model_settings=agents.ModelSettings(tool_choice="required", temperature=1.0, max_tokens=200),
        reset_tool_choice=False,
        tool_use_behavior=enough,
    )
    result = asyncio.run(agents.Runner.run(agent, "Hello.", max_turns=9))
    assert result.final_output == "done" and turns == 5 and len(seen) >= 5


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def history(*messages: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, *messages], "tools": TOOLS, "max_tokens": 3}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            history({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "wether", "arguments": "{}"}}]}),
            "messages[1] calls the tool 'wether', which is not among the tools of the request; supported: weather, add",
        ),
        (
            history(
                {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c2", "content": "1"}
            ),
            "messages[2] is the result of the call 'c2', which no message of the assistant holds",
        ),
        (
            {"messages": HELLO, "tools": [{"type": "web_search"}]},
            "the tool {'type': 'web_search'} is not of type function",
        ),
        (
            {"messages": HELLO, "tools": TOOLS, "tool_choice": "any"},
            "tool_choice 'any' is neither auto, none, required",
        ),
        (
            {"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice x; supported: auto, none, required, weather, add",
        ),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice required has no effect without tools"),
        ({"messages": HELLO, "tools": TOOLS * 65}, "tools are too many or too long; give at most 128 tools"),
        ({"messages": HELLO, "tools": TOOLS * 2}, "two tools are called weather"),
        ({"messages": HELLO, "tools": TOOLS, "max_tokens": 2, "tool_choice": "required"}, "too short for these tools"),
        ({"messages": HELLO, "n": 33}, "n 33 is too large for 1 prompts: at most 32 answers in all"),
        ({"messages": HELLO, "n": 0}, "n 0 is below 1"),
    ],
    ids=lambda part: part[:40] if isinstance(part, str) else None,
)
def test_what_is_wrong_with_tools_gets_one_sentence(body: dict[str, Any], message: str, port: int) -> None:
    status, text = send(port, CHAT, body)
    error = json.loads(text)["error"]
    assert status == 400 and message in error["message"] and "\n" not in error["message"], error
    assert error["type"] == "invalid_request_error" and error["param"]


def test_tools_belong_to_a_chat(port: int) -> None:
    status, text = send(port, COMPLETIONS, {"prompt": "It", "tools": TOOLS})
    assert status == 400 and "tools are not supported without messages" in text


def test_results_and_the_users_next_words_are_one_turn(port: int) -> None:
    """Two turns of the user in a row were refused by the template."""
    said = ({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "31"})
    assert ask(port, CHAT, **history(*said, {"role": "user", "content": "And now?"}))["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_gets_several_answers(stream: bool, client: Any) -> None:
    asked = {"model": "any", "messages": HELLO, "max_tokens": 5, "temperature": 2, "seed": 1, "logprobs": True}
    answer = client.chat.completions.create(**asked, n=3, stream=stream)
    texts, ends, roles = {0: "", 1: "", 2: ""}, dict[int, Any](), set()
    for event in answer if stream else [answer]:
        for choice in event.choices:
            said = choice.delta if stream else choice.message
            texts[choice.index] += said.content or ""
            roles |= {choice.index} if said.role else set()
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert len(set(texts.values())) == 3 and roles == {0, 1, 2} and set(ends.values()) == {"length"}
    if not stream:
        one = client.chat.completions.create(**asked)
        assert one.choices[0].message.content == texts[0] and one.usage.prompt_tokens == answer.usage.prompt_tokens
        assert answer.usage.completion_tokens == 15 and len(answer.choices[2].logprobs.content) == 5


def test_several_prompts_get_several_answers_each(client: Any) -> None:
    asked = {"model": "any", "max_tokens": 3, "temperature": 1, "seed": 1}
    answer = client.completions.create(prompt=["a", "It was"], n=2, echo=True, **asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith("It was") for choice in answer.choices] == [False, False, True, True]


@pytest.fixture(scope="module")
def strict_port(bundle: Path) -> Iterator[int]:
    import gemma_edge
    from gemma_edge.runtimes.generation.generate import GenerationOptions
    from gemma_edge.runtimes.serve.engine import Engine

    with in_a_thread(Engine(gemma_edge.load(bundle, threads=1), GenerationOptions(strict=True))) as port:
        yield port


def test_tools_count_as_part_of_the_prompt(strict_port: int) -> None:
    status, text = send(strict_port, CHAT, {"messages": HELLO, "tools": TOOLS, "max_tokens": 3})
    assert status == 400 and "exceed the bundle's context of 10" in text
