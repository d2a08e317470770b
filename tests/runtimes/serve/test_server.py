"""The server, through the clients that it is for: OpenAI's own, and a browser. A toy bundle: nonsense, but repeatable."""

from __future__ import annotations

import json
import threading
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from support.browsing.browser import needs_browser, wait_on
from support.serving import send, until

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("openai", reason="the package openai is not installed")

import openai

from gemma_edge.runtimes.generation.constrain import Grammar
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.runtimes.generation.text_generator import until_stop
from gemma_edge.runtimes.serve import engine as queue
from gemma_edge.runtimes.serve.api import chat_page
from gemma_edge.runtimes.serve.body import MAX_BODY_BYTES
from gemma_edge.runtimes.serve.engine import Engine, Job
from gemma_edge.runtimes.serve.messages import messages_of
from gemma_edge.runtimes.serve.openai import ParsedRequest
from gemma_edge.runtimes.serve.responses import Piece

HELLO: list[Any] = [{"role": "user", "content": "Hello."}]


def test_a_chat_is_the_sessions(client: Any, bundle: Path) -> None:
    session = Session.open(bundle, threads=1)
    expected = ["".join(session.send(text, GenerationOptions(max_tokens=9))) for text in ("Hello.", "Who are you?")]
    messages: list[Any] = []
    for text, reply in zip(("Hello.", "Who are you?"), expected, strict=True):
        messages.append({"role": "user", "content": text})
        answer = client.chat.completions.create(model="any", messages=messages, max_tokens=9)
        assert answer.choices[0].message.content == reply
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 9
        messages.append({"role": "assistant", "content": reply})
    assert answer.usage.prompt_tokens_details.cached_tokens > 10, "the first turn was fed again"


def test_a_stream_is_the_whole_answer_in_pieces(client: Any) -> None:
    whole = client.chat.completions.create(model="any", messages=HELLO, max_tokens=9)
    events = list(
        client.chat.completions.create(
            model="any", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [event.choices[0].delta.content for event in events[1:-2]]
    assert [event.choices[0].delta.role for event in events[:-1]] == ["assistant", *[None] * (len(events) - 2)]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3
    assert [event.choices[0].finish_reason for event in events[-3:-1]] == [None, "length"]
    assert events[-1].usage.completion_tokens == 9 and events[-1].choices == []


def test_a_text_is_continued_and_ends_before_a_stop_text(client: Any) -> None:
    text = client.completions.create(model="any", prompt="It was", max_tokens=12).choices[0].text
    cut = client.completions.create(model="any", prompt="It was", max_tokens=12, stop=[text[8:11], "never"])
    assert cut.choices[0].text == text[: text.index(text[8:11])] and cut.choices[0].finish_reason == "stop"
    streamed = client.completions.create(model="any", prompt="It was", max_tokens=12, stop=text[8:11], stream=True)
    assert "".join(event.choices[0].text for event in streamed) == cut.choices[0].text


def test_a_seed_repeats_a_sampled_answer(client: Any) -> None:
    first, again, other = (
        client.completions.create(model="any", prompt="It", temperature=1.5, top_p=0.9, seed=seed, max_tokens=9)
        for seed in (1, 1, 2)
    )
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_by_a_schema_is_what_the_client_asked_for(stream: bool, client: Any) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    asked = {"model": "any", "messages": HELLO, "max_tokens": 40, "temperature": 1.0, "seed": 3}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for response_format, keys in ((form, {"name", "age"}), ({"type": "json_object"}, None)):
        answer = client.chat.completions.create(**asked, response_format=response_format, stream=stream)
        if stream:
            text = "".join(event.choices[0].delta.content or "" for event in answer)
        else:
            text = answer.choices[0].message.content
        found = json.loads(text)
        assert isinstance(found, dict) and keys in (None, set(found))
    assert client.completions.create(
        model="any", prompt="It", max_tokens=3, extra_body={"response_format": {"type": "text"}}
    )


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "yaml"}, "response_format.type 'yaml' is not supported"),
        ({"type": "json_schema"}, "response_format.json_schema.schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}, "cannot be followed"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": PERSON}}, "an answer of 2 tokens is too short"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_at_once(form: Any, message: str, client: Any) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="any", messages=HELLO, max_tokens=2, response_format=form, stream=True)


def test_the_bundle_is_the_one_model(client: Any, port: int) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert json.loads(send(port, "/health")[1])["status"] == "ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 33}, "n 33 is too large for 1 prompts: at most 32 answers"),
        ({"tools": [{"type": "function"}]}, "is not of type function with an object in"),
        ({"max_completion_tokens": 0, "max_tokens": 3}, "max_completion_tokens 0 is below 1"),
        ({"max_tokens": -1}, "max_tokens -1 is below 1"),
        ({"temperature": -1}, "temperature -1 is neither"),
        ({"extra_body": {"temperature": "hot"}}, "temperature 'hot' is not a number"),
        ({"messages": []}, "messages are missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role is not one of system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "neither text nor a list of text"),
    ],
)
def test_what_is_not_there_is_refused_in_words(options: dict[str, Any], message: str, client: Any) -> None:
    asked = {"model": "any", "messages": HELLO, **options}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**asked)


def test_bodies_that_are_no_request(port: int) -> None:
    path = "/v1/completions"
    assert send(port, path, b"{")[0] == send(port, path, b"[]")[0] == send(port, path, b"\xff")[0] == 400
    assert send(port, path, b" " * (MAX_BODY_BYTES + 1))[0] == 413
    assert send(port, path)[0] == 405


def test_another_sites_name_for_this_machine_is_refused(port: int) -> None:
    """A page elsewhere could else make a browser send requests here, by a name that leads to 127.0.0.1."""
    assert send(port, "/v1/models", Host="evil.example")[0] == 400


def test_one_at_a_time_in_the_order_of_arrival(client: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[int]] = []
    running: list[int] = []
    all_wait = threading.Event()
    original = engine._answer

    def watched(job: Job, request: ParsedRequest, grammar: Grammar | None) -> None:
        running.append(1)
        assert len(running) == 1 and all_wait.wait(60)
        original(job, request, grammar)
        done.extend(map(list, request.prompts))
        running.pop()

    monkeypatch.setattr(engine, "_answer", watched)

    def ask(number: int) -> None:
        client.completions.create(model="any", prompt=f"It was {number}", max_tokens=3)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda number=number: bool(running) and engine.waiting == number)  # type: ignore[misc]
    all_wait.set()
    for thread in threads:
        thread.join(60)
    assert done == [engine.model.tokenizer.encode(f"It was {number}") for number in range(5)]


def test_a_full_queue_refuses_and_a_client_that_leaves_ends_its_answer(
    client: Any, engine: Engine, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_WAITING", 0)
    with pytest.raises(openai.InternalServerError, match="requests are waiting already"):
        client.completions.create(model="any", prompt="It", max_tokens=3)
    monkeypatch.undo()
    before = engine.counts["cancelled"]
    stream = client.completions.create(model="any", prompt="It", max_tokens=1_000_000, stream=True)
    next(iter(stream))
    stream.close()
    # comes only after the endless one
    assert client.completions.create(model="any", prompt="It", max_tokens=3).usage.completion_tokens == 3
    assert engine.counts["cancelled"] == before + 1
    metrics = send(port, "/metrics")[1]
    assert f"gemma_cancelled_total {before + 1}\n" in metrics and "gemma_waiting 0\n" in metrics


def test_an_answer_that_takes_too_long_ends(client: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()  # a second later at every look: before the prompt, and before each token
    monkeypatch.setattr(queue, "monotonic", lambda: next(clock))
    monkeypatch.setattr(engine, "time_limit_s", 10)
    answer = client.completions.create(model="any", prompt="It", max_tokens=1_000_000)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 9


def test_what_the_system_says_stands_before_the_first_turn() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]},
        {"role": "assistant", "content": "Hi."},
    ]
    assert messages_of({"messages": turns}) == [
        {"role": "user", "content": "Be brief.\n\nHello."},
        {"role": "assistant", "content": "Hi."},
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_stop_text_is_found_however_the_pieces_fall(size: int) -> None:
    text = "abcabcabdend<|stop|>rest"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert "".join(piece for piece, _ in until_stop(iter(pieces), ["<|stop|>", "zzz"])) == "abcabcabdend"
    assert "".join(piece for piece, _ in until_stop(iter(pieces), ["abcabd"])) == "abc"
    assert "".join(piece for piece, _ in until_stop(iter(pieces), ["rest!"])) == text


def test_the_page_is_a_file_of_the_package(port: int) -> None:
    status, page = send(port, "/")
    assert status == 200 and page == chat_page() and page.startswith("<!doctype html>")
    assert 'split("\\n\\n")' in page, "an escape of JavaScript, not a line end"


# Sends what is in the text field, once, and is true when the answer is there.
SENT = """document.title == "gemma-edge" && document.readyState == "complete" &&
(document.querySelector(".turn") || document.getElementById("form").requestSubmit(),
 document.querySelector("#used:not(:empty), .turn.error") != null)"""
# Three ways to run a script, if a page took text for HTML.
EVIL = """<img src=x onerror="document.title='hit'"><script>document.title='hit'</script>"'`${document.title='hit'}`"""


@needs_browser
def test_the_page_chats_in_a_browser(port: int, client: Any, tmp_path: Path) -> None:
    page, console = wait_on(f"http://127.0.0.1:{port}/?ask=Hello.", tmp_path, SENT)
    assert console == []
    for shown in ('<div class="turn user">Hello.</div>', '<h1 id="model">toy</h1>', "tokens in "):
        assert shown in page, page[-1500:]
    assert '<div class="turn assistant"></div>' not in page and "turn error" not in page


@needs_browser
def test_a_link_to_the_page_sends_nothing(port: int, engine: Engine, tmp_path: Path) -> None:
    """?ask=TEXT was sent at once, so that a link of any other page made the model work."""
    before = engine.counts["requests"]
    page, _ = wait_on(
        f"http://127.0.0.1:{port}/?ask=Hello.", tmp_path, "document.querySelector('h1')?.innerText == 'toy'"
    )
    assert engine.counts["requests"] == before and "turn user" not in page


@needs_browser
def test_the_page_shows_what_model_and_user_say_as_text(
    port: int, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "name", EVIL)
    monkeypatch.setattr(engine, "_choice", lambda request, index, state: iter([Piece(0, f"{EVIL}\n{EVIL}")]))
    page, console = wait_on(f"http://127.0.0.1:{port}/?{urlencode({'ask': EVIL})}", tmp_path, SENT)
    assert console == [] and "<title>gemma-edge</title>" in page
    assert page.count("<img") == 0 and page.count("<script") == 1 and page.count("&lt;img") == 4
