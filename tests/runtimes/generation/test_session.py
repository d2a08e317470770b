"""Conversations: the cache is reused, and always holds exactly the tokens that the session says."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.checkpoints import DEMO
from support.toys import END_OF_TURN, VOCAB, ToyRuntime, toy_backend, toy_manifest

from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.runtimes.generation.generate import STOP, GenerationOptions
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.text.chat import GEMMA2_TEMPLATE, ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

WORDS = range(1000, 1500)  # ordinary tokens of the demo tokenizer: letters, no bytes, no specials
ANYTHING = range(7, VOCAB)  # bytes that are no text, blanks at both ends, lone newlines
QUESTIONS = ["Hello.", "  Who are you? ", "日本語 😀", "It was"]


def make_session(
    runtime: ToyRuntime | None = None,
    template: ChatTemplate | None = None,
    **options: Any,
) -> tuple[Session, ToyRuntime]:
    runtime = runtime or ToyRuntime(allowed=WORDS)
    tokenizer = Tokenizer(DEMO, toy_manifest())
    template = template or ChatTemplate.from_bundle(DEMO)
    return Session(runtime, tokenizer, template, GenerationOptions(**options)), runtime


def say(session: Session, text: str, max_tokens: int = 12) -> str:
    return "".join(session.send(text, replace(session.options, max_tokens=max_tokens)))


@pytest.mark.parametrize("allowed", [WORDS, ANYTHING], ids=["words", "anything"])
@pytest.mark.parametrize("stop_after", [0, 20])
def test_every_turn_answers_as_a_fresh_prefill_of_the_same_tokens(allowed: range, stop_after: int) -> None:
    session, runtime = make_session(ToyRuntime(allowed=allowed, stop_after=stop_after))
    for question in QUESTIONS * 2:
        say(session, question)
        assert list(session.ids) == runtime.fed
        answer = session.answer_ids
        known = len(session.ids) - (len(answer) if session.ids[-len(answer) :] == answer else len(answer) - 1)
        fresh = ToyRuntime(allowed=allowed, stop_after=stop_after)
        logits = fresh.prefill(session.ids[:known])
        for token in answer:
            assert logits.argmax() == token
            logits = fresh.decode(token)


def test_a_turn_feeds_only_its_own_tokens() -> None:
    session, runtime = make_session()
    say(session, "Hello.")
    before = len(runtime.fed)
    unfed = session.answer_ids[-1]
    say(session, "Who are you?")
    turn = "<end_of_turn>\n<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    fed = runtime.fed[before:]
    # the last token of the cut-off answer, this turn, and the answer without its last token
    assert fed == [unfed, *session.tokenizer.encode(turn, bos=False), *session.answer_ids[:-1]]
    assert runtime.resets == 0


def test_the_cache_holds_the_text_of_the_rendered_conversation() -> None:
    untrimmed = ChatTemplate(GEMMA2_TEMPLATE.replace(" | trim", ""), {"bos_token": "<bos>"})
    session, _ = make_session(ToyRuntime(allowed=WORDS, stop_after=1), template=untrimmed)
    for question in QUESTIONS:
        say(session, question, max_tokens=100)
    rendered = session.template.render(session.messages, add_generation_prompt=False)
    assert f"<bos>{session.tokenizer.decode(session.ids)}<end_of_turn>\n" == rendered
    assert session.ids.count(session.tokenizer.bos_token_id) == 1


def test_blanks_around_an_answer_do_not_cost_a_prefill() -> None:
    r"""Gemma 2 ends most answers with " \n", which its template trims in the next turn."""
    blank = Tokenizer(DEMO, toy_manifest()).encode(" \n", bos=False)
    session, runtime = make_session(ScriptedRuntime([*blank, 1003, *blank, END_OF_TURN]))
    answer = say(session, "Hello.")
    assert answer.startswith(" \n") and answer.endswith(" \n")
    say(session, "Again.")
    assert runtime.resets == 0
    assert list(session.ids) == runtime.fed


def test_an_empty_answer_is_no_reason_to_start_over() -> None:
    session, runtime = make_session(ScriptedRuntime([END_OF_TURN]))
    assert say(session, "Hello.") == ""
    assert session.answer_ids == ()
    say(session, "Again.")
    assert runtime.resets == 0
    first = session.template.render([{"role": "user", "content": "Hello."}])
    assert session.tokenizer.decode(runtime.fed).startswith(first.removeprefix("<bos>") + "<end_of_turn>\n")


def test_an_answer_that_the_template_changes_is_taken_back_and_fed_as_it_is_then() -> None:
    shouting = ChatTemplate("{% for m in messages %}{{ m['content'] | upper }}<end_of_turn>{% endfor %}", {})
    session, runtime = make_session(template=shouting)
    say(session, "Hello.")
    say(session, "Again.")
    assert list(session.ids) == runtime.fed
    answer = session.messages[1]["content"].upper()
    assert session.tokenizer.decode(runtime.fed).startswith(f"HELLO.<end_of_turn>{answer}<end_of_turn>AGAIN.")


def test_a_template_that_trims_nothing_gets_no_blank_twice() -> None:
    blank = Tokenizer(DEMO, toy_manifest()).encode(" \n", bos=False)
    plain = ChatTemplate("{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}", {})
    session, runtime = make_session(ScriptedRuntime([*blank, 1003, *blank, END_OF_TURN]), template=plain)
    say(session, "Hello.")
    say(session, "Again.")
    assert runtime.resets == 0
    text = session.template.render(session.messages).removesuffix("<end_of_turn>")
    assert session.tokenizer.decode(runtime.fed) == text


def test_an_answer_can_be_stopped_and_the_chat_goes_on() -> None:
    session, runtime = make_session()
    answer = session.send("Hello.", GenerationOptions(max_tokens=100))
    text = "".join(islice(answer, 3))
    say(session, "Go on.")
    assert session.messages[1] == {"role": "assistant", "content": text}
    assert runtime.resets == 0
    assert list(session.ids) == runtime.fed


def test_an_answer_that_was_never_read_leaves_no_trace() -> None:
    session, runtime = make_session()
    session.send("Never mind.")
    say(session, "Hello.")
    assert [message["content"] for message in session.messages[::2]] == ["Hello."]
    assert list(session.ids) == runtime.fed


def test_messages_hold_the_conversation() -> None:
    session, _ = make_session()
    answers = [say(session, question) for question in QUESTIONS]
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 4
    assert [message["content"] for message in session.messages[::2]] == QUESTIONS
    assert [message["content"] for message in session.messages[1::2]] == answers


def test_reset_starts_a_new_conversation() -> None:
    session, runtime = make_session()
    first = say(session, "Hello.")
    say(session, "Who are you?")
    session.reset()
    assert (session.messages, session.ids) == ((), ())
    assert say(session, "Hello.") == first
    assert list(session.ids) == runtime.fed


def test_a_conversation_longer_than_the_context_goes_on() -> None:
    session, runtime = make_session()
    for question in QUESTIONS * 3:
        say(session, question)
    assert runtime.position > 10 * runtime.cache.context
    assert runtime.resets == 0


def test_strict_refuses_a_turn_and_leaves_the_conversation_as_it_was() -> None:
    roomy = toy_manifest(backends={"onnx": toy_backend(context=80)})
    session, runtime = make_session(ToyRuntime(roomy, allowed=WORDS), strict=True)
    say(session, "Hello.")
    messages, ids = session.messages, session.ids
    with pytest.raises(InputError, match="tokens of conversation, a prompt of .* exceed the bundle's context of 80"):
        session.send("It was a truth universally acknowledged " * 3)
    assert (session.messages, session.ids) == (messages, ids)
    say(session, "Short.")
    assert list(session.ids) == runtime.fed
    assert runtime.resets == 0


def test_a_turn_lost_to_an_interrupt_is_forgotten_and_the_cache_rebuilt() -> None:
    """An interrupt inside a forward pass leaves the cache unknown."""
    session, runtime = make_session(InterruptedRuntime(allowed=WORDS))
    first = say(session, "Hello.")
    assert isinstance(runtime, InterruptedRuntime)
    runtime.interrupt_in = 5
    with pytest.raises(KeyboardInterrupt):
        say(session, "Lost.")
    assert session.ids == ()
    assert session.messages[-1]["content"] == first
    say(session, "Again.")
    assert list(session.ids) == runtime.fed
    assert session.tokenizer.encode(session.template.render(session.messages[:3]))[:10] == runtime.fed[:10]


def test_a_runtime_used_by_someone_else_is_noticed() -> None:
    session, runtime = make_session()
    say(session, "Hello.")
    runtime.prefill([7, 8, 9])
    say(session, "Again.")
    assert list(session.ids) == runtime.fed
    assert 7 not in runtime.fed


def test_repetition_penalty_lasts_over_turns_until_reset() -> None:
    session, _ = make_session(ToyRuntime(allowed=range(1000, 1060)), sampling=SamplingParams(repetition_penalty=1e6))
    say(session, "Hello.")
    first = set(session.answer_ids)
    say(session, "Again.")
    assert not first & set(session.answer_ids)
    session.reset()
    say(session, "Hello.")
    assert set(session.answer_ids) == first


@pytest.mark.parametrize("read", [1, 100], ids=["closed early", "read to its end"])
def test_a_stop_text_ends_an_answer_and_is_no_part_of_the_conversation(read: int) -> None:
    whole, runtime = make_session()
    answer = say(whole, "Hello.", max_tokens=30)
    stop = answer[9:12]
    session, runtime = make_session(stop=(stop, "never"))
    pieces = session.send("Hello.")
    assert answer[: answer.index(stop)].startswith("".join(islice(pieces, read)))
    pieces.close()  # type: ignore[attr-defined]
    said = session.messages[1]["content"]
    if read == 100:
        assert said == answer[: answer.index(stop)] and session.usage.finish == STOP
    say(session, "Again.")
    assert list(session.ids) == runtime.fed[-len(session.ids) :]
    text = session.tokenizer.decode(session.ids)
    # an answer that was closed early keeps its blanks, as the model wrote them
    assert f"model\n{said.strip() if read == 100 else said}<end_of_turn>\n" in text


def test_a_turn_may_bring_its_own_options() -> None:
    session, _ = make_session(max_tokens=5)
    "".join(session.send("Hello.", GenerationOptions(max_tokens=3, sampling=SamplingParams(temperature=1, seed=1))))
    assert len(session.answer_ids) == 3
    "".join(session.send("Again."))
    assert len(session.answer_ids) == 5 and session.options.max_tokens == 5


class ScriptedRuntime(ToyRuntime):
    """Answers with these tokens, over and over; a forward call of several tokens starts an answer."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.script = script
        self.next = 0

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        logits = super()._forward(ids, every_position=every_position)
        self.next = self.next + 1 if len(ids) == 1 and ids[0] == self.script[self.next] else 0
        logits[:] = 0
        logits[:, self.script[self.next]] = 1
        return logits


class InterruptedRuntime(ToyRuntime):
    """Raises KeyboardInterrupt in the middle of a forward call, when told to."""

    interrupt_in = 0

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        logits = super()._forward(ids, every_position=every_position)
        if self.interrupt_in:
            self.interrupt_in -= 1
            if not self.interrupt_in:
                raise KeyboardInterrupt
        return logits
