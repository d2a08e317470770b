"""Sessions that are taken back, forked, cancelled, saved and taken up again: each answers as one that was never disturbed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.toys import CHUNK, END_OF_TURN, ToyRuntime, write_toy_bundle

from gemma_edge.errors import InputError
from gemma_edge.logits import Logits
from gemma_edge.runtimes.generation.generate import (
    CANCELLED,
    CHUNKS_BETWEEN_CHECKS,
    LENGTH,
    STOP,
    GenerationOptions,
    GenerationState,
    Usage,
    generate,
)
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.session import Session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("session") / "bundle")


@pytest.fixture
def session(bundle: Path) -> Session:
    return Session.open(bundle, threads=1)


def say(session: Session, text: str) -> str:
    return "".join(session.send(text, GenerationOptions(max_tokens=9)))


def answers(bundle: Path, *texts: str, **options: Any) -> list[str]:
    fresh = Session.open(bundle, threads=1, **options)
    return [say(fresh, text) for text in texts]


def test_a_turn_taken_back_leaves_no_trace(session: Session, bundle: Path) -> None:
    say(session, "Hello.")
    say(session, "Who are you?")
    say(session, "And you?")
    session.rewind(2)
    assert len(session.messages) == 2
    assert say(session, "It was") == answers(bundle, "Hello.", "It was")[1]
    with pytest.raises(InputError, match="cannot take back 3 turns: the conversation has 2"):
        session.rewind(3)


def test_forks_do_not_see_each_other(session: Session, bundle: Path) -> None:
    say(session, "Hello.")
    other = session.fork()
    for _ in range(2):
        ours, theirs = say(session, "Who are you?"), say(other, "It was")
        session.rewind()
        other.rewind()
        assert [ours] == answers(bundle, "Hello.", "Who are you?")[1:]
        assert [theirs] == answers(bundle, "Hello.", "It was")[1:]


def test_a_saved_session_goes_on_with_the_same_bits(session: Session, bundle: Path, tmp_path: Path) -> None:
    said = [say(session, "Hello."), say(session, "Who are you?")]
    session.save(tmp_path / "session")
    taken_up = Session.open(bundle, threads=1)
    taken_up.restore(tmp_path / "session")
    assert taken_up.messages == session.messages and taken_up.ids == session.ids
    assert say(taken_up, "It was") == say(session, "It was")
    assert taken_up.answer_ids == session.answer_ids
    assert taken_up.runtime.stats.refed_tokens == 0 and taken_up.usage.cached_tokens > 40
    taken_up.rewind(2)
    assert taken_up.messages[1]["content"] == said[0]


def test_a_session_file_is_no_prefix_and_the_other_way_round(session: Session, tmp_path: Path) -> None:
    from gemma_edge.runtimes.generation import prefix

    say(session, "Hello.")
    session.save(tmp_path / "session")
    with pytest.raises(InputError, match="holds no prefix"):
        prefix.load(session.runtime, tmp_path / "session")
    prefix.save(session.runtime, "It was", tmp_path / "prefix", chat=True)
    before = session.messages
    with pytest.raises(InputError, match="holds no conversation"):
        session.restore(tmp_path / "prefix")
    assert session.messages == before


class SlowRuntime(ToyRuntime):
    """Waits in its n-th forward call until it is let go."""

    def __init__(self, wait_in: int, **options: Any) -> None:
        super().__init__(**options)
        self.wait_in, self.waiting, self.go_on = wait_in, threading.Event(), threading.Event()

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        if len(self.chunks) == self.wait_in:
            self.waiting.set()
            assert self.go_on.wait(60)
        return super()._forward(ids, every_position=every_position)


@pytest.mark.parametrize(("wait_in", "tokens"), [(1, 0), (6, 3)], ids=["in the prompt", "in the answer"])
def test_another_thread_cancels_an_answer(wait_in: int, tokens: int, session: Session) -> None:
    runtime = SlowRuntime(wait_in, allowed=range(1000, 1500))
    slow = Session(runtime, session.tokenizer, session.template)
    question = "Who are you? " * (1 if tokens else 3)
    prompt = len(slow.tokenizer.encode(slow.template.render([{"role": "user", "content": question}])))
    assert prompt == 4 * CHUNK if tokens else prompt > CHUNKS_BETWEEN_CHECKS * CHUNK
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(slow.send(question, GenerationOptions(max_tokens=50))))
    thread.start()
    assert runtime.waiting.wait(60)
    slow.cancel()
    runtime.go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert (slow.usage.finish, slow.usage.new_tokens, len(slow.answer_ids)) == (CANCELLED, tokens, tokens)
    assert runtime.position == (prompt + tokens if tokens else CHUNKS_BETWEEN_CHECKS * CHUNK)
    assert "".join(found) == slow.messages[1]["content"]
    again = ToyRuntime(allowed=range(1000, 1500))
    for text in ("Go on.", "And then?"):  # a cancelled answer is a short one
        say(slow, text)
        assert list(slow.ids) == runtime.fed
        logits = again.prefill(runtime.fed[again.position : len(runtime.fed) - 8])
        assert logits.argmax() == slow.answer_ids[0]


def test_usage_counts_and_says_why_it_ended() -> None:
    runtime, state = ToyRuntime(stop_after=8), GenerationState(Sampler(SamplingParams()))
    prompt = [2, 100, 200, 300, 400, 500]
    tokens = list(generate(runtime, prompt, GenerationOptions(max_tokens=9), stop_ids=[END_OF_TURN], state=state))
    assert state.ids == tokens
    assert state.usage == Usage(prompt_tokens=6, cached_tokens=0, new_tokens=len(tokens), finish=STOP)
    state = GenerationState(Sampler(SamplingParams()))
    list(generate(runtime, [7], GenerationOptions(max_tokens=2), state=state))
    assert state.usage == Usage(
        prompt_tokens=runtime.position - 1, cached_tokens=runtime.position - 2, new_tokens=2, finish=LENGTH
    )
