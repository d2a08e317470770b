"""What OpenAI's clients use beside the plain chat: lists of prompts, log-probabilities, echo, usage, one model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.serving import CHAT, COMPLETIONS, ask, in_a_thread, send

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("openai", reason="the package openai is not installed")

import openai

import gemma_edge
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve.engine import Engine

HELLO: list[Any] = [{"role": "user", "content": "Hello."}]
TEXT = "It was"


@pytest.fixture(scope="module")
def other(bundle: Path) -> Runtime:
    """The same bundle, opened a second time, to compare with."""
    return gemma_edge.load(bundle, threads=1)


def log_softmax(runtime: Runtime, ids: list[int]) -> Any:
    """(T, V), after each token."""
    import torch

    return torch.from_numpy(runtime.score(ids)).double().log_softmax(-1).numpy()


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_get_a_choice_each(stream: bool, client: Any, engine: Engine) -> None:
    ids = engine.model.tokenizer.encode(TEXT)
    alone = [client.completions.create(model="any", prompt=text, max_tokens=5).choices[0].text for text in ("a", TEXT)]
    answer = client.completions.create(model="any", prompt=[[2, 4], ids], max_tokens=5, stream=stream)
    texts, ends = {0: "", 1: ""}, dict[int, str | None]()
    for event in answer if stream else [answer]:
        for choice in event.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert texts[1] == alone[1] != alone[0] and texts[0] and ends == {0: "length", 1: "length"}
    if not stream:
        assert answer.usage.prompt_tokens == 2 + len(ids) and answer.usage.completion_tokens == 10


def test_log_probabilities_of_a_chat_are_the_models(client: Any, engine: Engine, other: Runtime) -> None:
    asked = {"model": "any", "messages": HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked)
    content = answer.choices[0].logprobs.content
    prompt = engine.model.tokenizer.encode(engine.model.template.render(HELLO))
    assert b"".join(bytes(token.bytes) for token in content).decode() == answer.choices[0].message.content
    scores = log_softmax(other, prompt)[-1]
    best = scores.argsort()[::-1][:3]
    first = content[0]
    assert first.logprob == pytest.approx(scores[best[0]], abs=1e-4)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(list(scores[best]), abs=1e-4)
    assert [bytes(top.bytes) for top in first.top_logprobs] == [engine.model.tokenizer.token_bytes(i) for i in best]
    streamed = [event.choices[0].logprobs for event in client.chat.completions.create(**asked, stream=True)]
    assert [token.bytes for part in streamed if part for token in part.content] == [token.bytes for token in content]


def test_log_probabilities_of_a_prompt_come_with_echo(client: Any, engine: Engine, other: Runtime) -> None:
    ids = engine.model.tokenizer.encode(TEXT)
    answer = client.completions.create(model="any", prompt=TEXT, max_tokens=4, logprobs=2, echo=True)
    (choice,), logprobs = answer.choices, answer.choices[0].logprobs
    plain = client.completions.create(model="any", prompt=TEXT, max_tokens=4).choices[0].text
    assert choice.text == TEXT + plain
    expected = log_softmax(other, ids)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for at in range(1, len(ids)):
        assert logprobs.token_logprobs[at] == pytest.approx(expected[at - 1, ids[at]], abs=1e-4)
        assert max(logprobs.top_logprobs[at].values()) == pytest.approx(expected[at - 1].max(), abs=1e-4)
    assert len(logprobs.tokens) == len(ids) + 4 and all(math.isfinite(each) for each in logprobs.token_logprobs[1:])
    for token, offset in list(zip(logprobs.tokens, logprobs.text_offset, strict=True))[1:]:
        assert choice.text.startswith(token, offset)


def test_one_model_has_a_path(client: Any) -> None:
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


def test_every_error_is_json_that_names_the_field(port: int) -> None:
    for path, body, status in (("/nowhere", None, 404), (COMPLETIONS, None, 405), (COMPLETIONS, {"best_of": 2}, 400)):
        answer, text = send(port, path, body)
        error = json.loads(text)["error"]
        assert answer == status and error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == "best_of"


def test_an_assistant_that_said_nothing_and_a_tool_are_read(client: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "31"},
    ]
    answer = client.chat.completions.create(model="any", messages=turns, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_what_the_context_does_not_hold_is_counted(port: int) -> None:
    """A prompt longer than the context was silently cut. The toy's context is 10."""
    usage = ask(port, COMPLETIONS, prompt=[7] * 25, max_tokens=2)["usage"]
    assert usage["prompt_tokens"] == 25 and usage["prompt_tokens_details"]["truncated_tokens"] == 15
    assert (
        ask(port, COMPLETIONS, prompt=[7] * 10, max_tokens=2)["usage"]["prompt_tokens_details"]["truncated_tokens"] == 0
    )


def test_a_strict_server_refuses_what_it_would_forget(bundle: Path) -> None:
    strict = Engine(gemma_edge.load(bundle, threads=1), GenerationOptions(max_tokens=3, strict=True))
    with in_a_thread(strict) as port:
        for stream in (False, True):
            status, text = send(port, COMPLETIONS, {"prompt": [7] * 8, "max_tokens": 9, "stream": stream})
            assert status == 400 and "exceed the bundle's context of 10" in text
        assert ask(port, COMPLETIONS, prompt=[7] * 2)["usage"]["completion_tokens"] == 3, "-n of the command line"
        assert ask(port, COMPLETIONS, prompt=[7] * 8)["usage"]["completion_tokens"] == 2, "what is left"


def test_json_has_no_blanks_between_its_parts(port: int) -> None:
    """20 blanks and a new line were allowed between two parts, and half of the tokens were spent on them."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    types = {"a": {"type": "integer"}, "b": {"type": "boolean"}}
    items = {"type": "object", "properties": types, "required": ["a", "b"], "additionalProperties": False}
    schema = {"type": "array", "items": items, "minItems": 3, "maxItems": 3}
    for seed in range(5):
        answer = ask(
            port, CHAT, messages=HELLO, max_tokens=200, guided_json=schema, temperature=1e6, seed=seed
        )  # so hot that every token which may follow is as likely as the others
        text = answer["choices"][0]["message"]["content"]
        parsed = json.loads(text)
        assert len(parsed) == 3 and not set(text) & set(" \n\r\t"), text
