"""Prompt lookup changes how tokens are computed, and never which."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.toys import END_OF_TURN, RepeatingRuntime, write_toy_bundle

import gemma_edge
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import CANCELLED, GenerationOptions, GenerationState, Usage, generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.speculate import CLOSE, EXACT, Speculation

GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1, top_k=3, repetition_penalty=1.01, seed=3)


class InexactRuntime(RepeatingRuntime):
    """Rounds otherwise when it gets several tokens at once, and goes on with what it has computed then."""

    def _forward(self, ids: NDArray[np.int64], *, every_position: bool) -> Logits:
        logits = super()._forward(ids, every_position=every_position)
        return np.nextafter(logits, np.float32(9)) if len(ids) > 1 and every_position else logits


def run(
    runtime: Runtime, speculation: Speculation | None, params: SamplingParams = GREEDY, **options: Any
) -> list[int]:
    max_tokens = options.pop("max_tokens", 200)
    state = GenerationState(Sampler(params), speculation=speculation, **options)
    asked = GenerationOptions(max_tokens=max_tokens)
    return list(generate(runtime, [2, 50, 60], asked, stop_ids=[END_OF_TURN], state=state))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strays", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("mode", [EXACT, CLOSE])
def test_output_is_that_of_plain_decoding(mode: str, strays: float, params: SamplingParams) -> None:
    plain, guessed = RepeatingRuntime(strays), RepeatingRuntime(strays)
    assert run(plain, None, params) == run(guessed, Speculation(guessed, mode), params)
    assert guessed.fed[: guessed.position] == plain.fed and guessed.ids == plain.ids
    stats = guessed.stats
    assert stats.decode_tokens - stats.drafted_tokens + stats.accepted_tokens == plain.stats.decode_tokens
    if strays == 0:
        assert stats.accepted_tokens > 150 and len(guessed.chunks) < len(plain.chunks) / 3
    if strays == 1:
        # guesses that are always wrong are given up
        assert stats.drafted_tokens < 25


@pytest.mark.parametrize("count", range(1, 40, 3))
def test_a_text_that_ends_anywhere_leaves_the_runtime_as_plain_decoding_does(count: int) -> None:
    plain, guessed = RepeatingRuntime(0.1), RepeatingRuntime(0.1)
    speculation = Speculation(guessed)
    assert run(plain, None, max_tokens=count) == run(guessed, speculation, max_tokens=count)
    assert guessed.ids == plain.ids
    options = GenerationOptions(max_tokens=99)
    stream = generate(guessed, [70], options, state=GenerationState(Sampler(GREEDY), speculation=speculation))
    other = generate(plain, [70], options)
    assert list(islice(stream, count)) == list(islice(other, count))
    stream.close()  # type: ignore[attr-defined]
    assert guessed.ids == plain.ids
    usage, looks = Usage(), iter([False] * (count + 1) + [True])
    tokens = run(guessed, speculation, usage=usage, cancelled=lambda: next(looks))
    assert (usage.finish, len(tokens)) == (CANCELLED, count)


def test_a_stop_token_among_the_guesses_ends_the_text() -> None:
    plain, guessed = RepeatingRuntime(0, stop_after=61), RepeatingRuntime(0, stop_after=61)
    text = run(plain, None)
    assert len(text) == 67 and run(guessed, Speculation(guessed)) == text and guessed.ids == plain.ids


def test_kernels_that_round_otherwise_are_noticed_and_leave_no_trace() -> None:
    plain, guessed, said = InexactRuntime(), InexactRuntime(), list[str]()
    speculation = Speculation(guessed, notify=said.append)
    for _ in range(2):
        assert run(plain, None) == run(guessed, speculation)
    assert speculation.refused and len(said) == 1 and "`speculate`=close" in said[0]
    assert guessed.stats.drafted_tokens == 0 and guessed.stats.decode_tokens == plain.stats.decode_tokens
    assert guessed.chunks.count(4) == 1  # of the CHECKED_TOKENS; 4 is the most in one call
    close = InexactRuntime()
    run(close, Speculation(close, CLOSE))
    assert close.stats.accepted_tokens > 100


def test_nothing_is_guessed_that_could_not_be_taken_back_for_free(tmp_path: Path) -> None:
    """ONNX Runtime's window moves down every few tokens, and what is lost then had to be fed again."""
    bundle = write_toy_bundle(tmp_path / "bundle")
    plain, guessed = (gemma_edge.load(bundle, threads=1) for _ in range(2))
    text = run(plain, None, max_tokens=300)
    assert run(guessed, Speculation(guessed, CLOSE), max_tokens=300) == text
    assert guessed.stats.refed_tokens == 0 and guessed.stats.drafted_tokens > 0
