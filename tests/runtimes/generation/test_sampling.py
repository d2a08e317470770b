"""The sampler against transformers' logits processors, and on its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams

WARM = SamplingParams(temperature=1.0)
SETTINGS = [
    WARM,
    replace(WARM, temperature=0.3),
    replace(WARM, temperature=2.5),
    replace(WARM, top_k=1),
    replace(WARM, top_k=40),
    replace(WARM, top_k=5000),
    replace(WARM, top_p=0.9),
    replace(WARM, top_p=0.01),
    replace(WARM, top_p=0.999),
    replace(WARM, min_p=0.05),
    replace(WARM, min_p=1.0),
    replace(WARM, repetition_penalty=1.3),
    replace(WARM, repetition_penalty=0.8),
    SamplingParams(temperature=0.7, top_k=64, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
]


def random_logits(size: int, seed: int) -> NDArray[np.float32]:
    """Peaked like a language model's, in the range of Gemma 2's final softcap."""
    values = np.random.default_rng(seed).normal(0, 4, size)
    return (30 * np.tanh(values / 30)).astype(np.float32)


def transformers_probabilities(
    params: SamplingParams, logits: NDArray[np.float32], context: list[int]
) -> NDArray[np.float64]:
    """What `generate(do_sample=True)` would draw from, in its order."""
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    # float64, so that transformers' own rounding of the cumulative sums decides nothing
    scores = LogitsProcessorList(processors)(torch.LongTensor([context]), torch.from_numpy(logits)[None].double())
    probabilities: NDArray[np.float64] = scores.softmax(-1)[0].numpy()
    return probabilities


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [50, 3000, 256_000])
def test_distribution_is_that_of_transformers(params: SamplingParams, size: int) -> None:
    logits = random_logits(size, seed=size)
    context = [int(token) for token in logits.argsort()[::-7][:20]]
    sampler = Sampler(params)
    sampler.observe(context)
    ids, probabilities = sampler.distribution(logits)
    expected = transformers_probabilities(params, logits, context)
    assert set(ids.tolist()) == set(np.flatnonzero(expected).tolist())
    # float32 exponentials of numbers up to 100: 100 x 2^-24 relative; below 1e-37 float32 is coarser
    np.testing.assert_allclose(probabilities, expected[ids], rtol=2e-5, atol=1e-37)


def test_ties_with_the_last_of_top_k_stay() -> None:
    logits = np.array([0, 3, 2, 2, 2, 1] + [0] * 100, np.float32)
    ids, _ = Sampler(replace(WARM, top_k=2)).distribution(logits)
    assert sorted(ids.tolist()) == [1, 2, 3, 4]


def test_default_takes_the_most_likely_token() -> None:
    logits = random_logits(1000, seed=0)
    assert Sampler(SamplingParams()).sample(logits) == logits.argmax()


def test_repetition_penalty_applies_to_greedy_and_to_both_signs() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    sampler.observe([0, 2])
    assert sampler.sample(np.array([1.0, 0.6, -0.1], np.float32)) == 1
    assert sampler.sample(np.array([-1.0, -1.5, -0.9], np.float32)) == 1


def test_forget_ends_the_penalty() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    sampler.observe([0])
    sampler.forget()
    assert sampler.sample(np.array([1.0, 0.6], np.float32)) == 0


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(100, seed=1)
    before = logits.copy()
    sampler = Sampler(SETTINGS[-1])
    sampler.observe(range(50))
    sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


def test_same_seed_draws_the_same_tokens() -> None:
    logits = random_logits(1000, seed=2)
    first, again, other = (
        [sampler.sample(logits) for _ in range(20)] for sampler in (Sampler(replace(WARM, seed=s)) for s in (1, 1, 2))
    )
    assert first == again != other


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(replace(WARM, seed=0))
    counts = Counter(sampler.sample(logits) for _ in range(20_000))
    # four standard deviations of a binomial of 20,000: 0.014
    assert [counts[token] / 20_000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.014)


def test_coldest_temperature_is_greedy_and_finite() -> None:
    logits = random_logits(1000, seed=3)
    assert Sampler(SamplingParams(temperature=1e-6)).sample(logits) == logits.argmax()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is neither 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": 1e-9}, "between 1e-06 and 1000000"),
        ({"top_k": -1}, "top_k -1 is below 0"),
        ({"top_p": 0.0}, "top_p 0.0 is not above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"min_p": -0.1}, "min_p -0.1 is not between 0 and 1"),
        ({"min_p": float("nan")}, "min_p nan"),
        ({"temperature": 1e300}, r"temperature 1e\+300"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty 1e-300 is not between 1e-06 and 1000000"),
        ({"seed": -1}, "seed -1 is below 0"),
    ],
)
def test_a_number_that_no_filter_takes_is_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(), WARM])
def test_logits_that_are_no_numbers_are_an_error(params: SamplingParams, bad: float) -> None:
    logits = random_logits(100, seed=4)
    logits[50] = bad
    with pytest.raises(InputError, match="not finite numbers"):
        Sampler(params).sample(logits)
