"""Prompt lookup on every backend: 50 prompts, the text is that of plain decoding token for token."""

from __future__ import annotations

from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState, generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.speculate import EXACT, Speculation
from gemma_edge.text.tokenizer import Tokenizer

WORDS = """And the LORD God said unto Moses man of truth universally It is a single that in possession good fortune must be want
wife She was not her own Mr Darcy Elizabeth then behold they went into house Israel children king David came to pass when he had
done my dear sister you will never""".split()[:50]


def test_every_text_is_that_of_plain_decoding(talker: Runtime) -> None:
    speculation = Speculation(talker, EXACT)
    assert len(WORDS) == 50
    assert said(talker, None) == said(talker, speculation)
    if speculation.refused:
        assert talker.stats.drafted_tokens == 0
        assert type(talker).__name__ != "ExecuTorchRuntime", "XNNPACK gave a row the same bits whatever is beside it"
    else:
        assert talker.stats.accepted_tokens > 300


def said(runtime: Runtime, speculation: Speculation | None) -> list[list[int]]:
    """Answers, far past the context of 48."""
    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    found = []
    for word in WORDS:
        runtime.reset()
        answer = generate(
            runtime,
            tokenizer.encode(word),
            GenerationOptions(max_tokens=70),
            stop_ids=tokenizer.stop_ids,
            state=GenerationState(Sampler(SamplingParams()), speculation=speculation),
        )
        found.append(list(answer))
    return found
