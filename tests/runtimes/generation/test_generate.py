"""Streaming generation on a toy model whose logits depend on every token fed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from support.toys import CHUNK, END_OF_TURN, ToyRuntime, toy_manifest

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.generate import GenerationOptions, generate
from gemma_edge.runtimes.generation.sampling import SamplingParams

PROMPT = [2, 100, 200, 300, 400, 500]


def run(runtime: ToyRuntime, prompt: list[int], **options: Any) -> list[int]:
    stop_ids = options.pop("stop_ids", ())
    return list(generate(runtime, prompt, GenerationOptions(**{"max_tokens": 8, **options}), stop_ids=stop_ids))


def greedy(prompt: list[int], count: int) -> list[int]:
    """Every token from a fresh prefill of all before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(ToyRuntime().prefill(ids).argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_matches_a_fresh_prefill_of_every_step() -> None:
    assert run(ToyRuntime(), PROMPT) == greedy(PROMPT, 8)


def test_prompt_is_fed_in_chunks_and_answers_token_by_token() -> None:
    runtime = ToyRuntime()
    run(runtime, PROMPT, max_tokens=4)
    assert runtime.chunks == [CHUNK, len(PROMPT) - CHUNK, 1, 1, 1]


def test_the_last_token_is_not_fed() -> None:
    runtime = ToyRuntime()
    tokens = run(runtime, PROMPT, max_tokens=4)
    assert len(tokens) == 4
    assert runtime.fed == PROMPT + tokens[:3]


def test_a_stop_token_ends_the_text_and_is_neither_yielded_nor_fed() -> None:
    runtime = ToyRuntime(stop_after=8)
    tokens = run(runtime, PROMPT, stop_ids=[END_OF_TURN])
    assert tokens == greedy(PROMPT, 4)
    assert runtime.fed == PROMPT + tokens


def test_tokens_come_as_they_are_computed() -> None:
    runtime = ToyRuntime()
    stream = generate(runtime, PROMPT, GenerationOptions(max_tokens=1000))
    assert runtime.fed == []
    assert list(islice(stream, 3)) == greedy(PROMPT, 3)
    assert runtime.position == len(PROMPT) + 2


def test_generation_goes_on_beyond_the_context() -> None:
    runtime = ToyRuntime()
    context = runtime.cache.context
    tokens = run(runtime, PROMPT, max_tokens=5 * context)
    assert len(tokens) == 5 * context
    assert runtime.position == len(PROMPT) + 5 * context - 1


def test_generation_continues_what_the_runtime_has_seen() -> None:
    runtime = ToyRuntime()
    runtime.prefill(PROMPT[:3])
    assert run(runtime, PROMPT[3:]) == greedy(PROMPT, 8)


def test_strict_refuses_what_exceeds_the_context_before_feeding_it() -> None:
    runtime = ToyRuntime(toy_manifest())
    with pytest.raises(InputError, match=r"^a prompt of 6 tokens and 5 new ones exceed the bundle's context of 10;"):
        generate(runtime, PROMPT, GenerationOptions(max_tokens=5, strict=True))
    assert runtime.chunks == []
    assert len(run(runtime, PROMPT, max_tokens=4, strict=True)) == 4
    with pytest.raises(InputError, match=r"^9 tokens of conversation, a prompt of 1 tokens and 1 new ones"):
        run(runtime, [7], max_tokens=1, strict=True)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": -1}])
def test_max_tokens_below_one_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="max_tokens -?[01] is below 1"):
        run(ToyRuntime(), PROMPT, **options)


@pytest.mark.parametrize("options", [{"stop": ("a",)}, {"json_schema": {}}, {"speculate": "exact"}])
def test_what_only_text_can_have_is_refused_and_not_ignored(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"generate does not handle {next(iter(options))}; use Session"):
        run(ToyRuntime(), PROMPT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "text"}, "stop 'text' is not a tuple"),
        ({"stop": ("",)}, "is not a tuple of texts"),
        ({"speculate": "maybe"}, "speculate maybe; supported: exact, close"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationOptions(**options)


def test_an_empty_prompt_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="no token to feed"):
        generate(ToyRuntime(), [], GenerationOptions(max_tokens=1))


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    """With a heavy penalty no token of the context comes twice, as long as others have positive logits."""
    runtime = ToyRuntime(allowed=range(100, 160))
    sampling = SamplingParams(repetition_penalty=1e6)
    prompt = list(range(100, 110))
    tokens = list(generate(runtime, prompt, GenerationOptions(max_tokens=10, sampling=sampling)))
    assert len(set(prompt + tokens)) == 20
    assert np.isin(tokens, range(110, 160)).all()
