"""Write what the Python runtime computes from one backend of a bundle, on the library's version that Kotlin runs.

The Kotlin runtime must compute the logits in `runtime.f32` bit for bit, and those in `state.f32` after it has loaded
`state.safetensors`. `answers.json` holds everything that is text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import gemma_edge
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.adapter import Adapter
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.state import write_state
from gemma_edge.runtimes.generation.generate import GenerationOptions, generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

PROMPTS = ["And the LORD said unto", "It is a truth universally acknowledged, that", "Call me Ishmael. \U0001f40b"]
TURNS = ["Who are you?", "  And what is  a whale?\n", "Tell me more.\u0085"]
PREFIX = "Be kind. "
REFED = 5  # calls
FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 1.1, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
]
SYSTEMS = ("Be brief.", f" \n{chr(0x85)} Be kind. \n")  # what a system says is not trimmed
BLANKS = "".join(chr(code) for code in range(0x3100) if chr(code).isspace())


def fed(runtime: Runtime) -> tuple[list[int], list[int]]:
    """The tokens to feed, and how many of them in each call.

    Uneven chunks fill the caches and what they keep of the beginning. Then come as many single steps as move every layer's rows.
    """
    cache = runtime.cache
    chunk = cache.prefill_chunk
    calls = [1, 3, chunk, 1, 2 * chunk + 3, 5, 1, chunk - 1, 1]
    missing = max(layer.slots for layer in cache.layers) - sum(calls)
    calls += [*([missing] if missing > 0 else []), *[1] * max(40, chunk + 12)]
    vocab = runtime.manifest.config.vocab_size
    return [(7 * i * i + 3 * i + 11) % vocab for i in range(sum(calls))], calls


def logits_of(runtime: Runtime, tokens: list[int], calls: list[int]) -> Logits:
    """The logits after each call, (calls, V); feeding begins at the runtime's position."""
    rows, start = [], 0
    for length in calls:
        ids = tokens[start : start + length]
        rows.append(runtime.decode(ids[0]) if length == 1 else runtime.prefill(ids))
        start += length
    return np.stack(rows)


def state_calls(calls: list[int]) -> int:
    """How many calls come before a state is saved. By then the windows have slid, and only single steps follow."""
    return len(calls) - 30


def write_rewound_state(out: Path, runtime: Runtime, tokens: list[int], calls: list[int]) -> None:
    """Write `state.safetensors`, the state after a token was taken back, and the logits after it was restored.

    They are in `state.f32`, and those after its tokens were fed again in `refed.f32`, for the first of the calls that follow.
    """
    before = state_calls(calls)
    at = sum(calls[:before])
    runtime.reset()
    logits_of(runtime, tokens, calls[: before + 1])
    runtime.rewind(1)
    state = runtime.snapshot()
    write_state(out / "state.safetensors", state, {"kept": "with it"})
    runtime.restore(state)
    logits_of(runtime, tokens[at:], calls[before:]).astype("<f4").tofile(out / "state.f32")
    runtime.restore(replace(state, rows={}))
    logits_of(runtime, tokens[at:], calls[before : before + REFED]).astype("<f4").tofile(out / "refed.f32")


def greedy(runtime: Runtime, tokenizer: Tokenizer, prompt: str) -> str:
    """The greedy continuation of a prompt."""
    runtime.reset()
    runtime.pin(0)
    options = GenerationOptions(max_tokens=60)
    tokens = generate(runtime, tokenizer.encode(prompt), options, stop_ids=tokenizer.stop_ids)
    return "".join(tokenizer.stream(tokens))


def conversation(runtime: Runtime, tokenizer: Tokenizer, saved: Path, prefix: str = "") -> list[dict[str, Any]]:
    """Greedy answers to all turns, with the runtime's position and the number of its pinned tokens after each.

    The conversation is saved to `saved` before each turn, so the file holds all turns but the last.
    """
    session = Session(runtime, tokenizer, ChatTemplate.from_bundle(runtime.bundle), prefix=prefix)
    session.reset()
    rows = []
    for text in TURNS:
        session.save(saved)
        answer = "".join(session.send(text, GenerationOptions(max_tokens=20)))
        rows.append({"text": text, "answer": answer, "position": runtime.position, "pinned": runtime.pinned})
    return rows


def write_interleaved(out: Path, bundle: Path, adapters: list[Path]) -> None:
    """Write `interleaved.json`: answers of sessions that share a runtime and take turns.

    There is one session with each adapter, and the last has none. A session feeds its tokens again, in larger chunks than
    alone, so the last bits differ and now and then an answer does.
    """
    runtime = gemma_edge.load(bundle, backend="onnx", threads=1)
    tokenizer, template = Tokenizer(bundle, runtime.manifest), ChatTemplate.from_bundle(bundle)
    sessions = []
    for adapter in [*map(Adapter.open, adapters), None]:
        runtime.use_adapter(None)
        sessions.append(Session(runtime, tokenizer, template, GenerationOptions(max_tokens=20), adapter=adapter))
    rows = [["".join(session.send(text)) for session in sessions] for text in TURNS]
    (out / "interleaved.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def chats(runtime: Runtime) -> list[dict[str, Any]]:
    """Conversations, with system turns too where the model is a Gemma 3, and the text that its chat template makes of them."""
    template = ChatTemplate.from_bundle(runtime.bundle)
    systems = SYSTEMS if runtime.manifest.config.architecture == "gemma3_text" else ()
    openings, rows = [[], *([{"role": "system", "content": text}] for text in systems)], []
    for turns in (
        ["Hi"],
        ["Hi", "Hello.", "Why?"],
        [" \n Hi \t", "\nHello.  ", f"{BLANKS}x{BLANKS}"],
        ["", "<eos>", "ü"],
    ):
        said = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
        rows += [{"messages": [*first, *said], "text": template.render([*first, *said])} for first in openings]
    return rows


def filters() -> list[dict[str, Any]]:
    """Logits with ties, and the distribution that each set of filters leaves of them."""
    rng = np.random.default_rng(0)
    rows = []
    for params in FILTERS:
        logits = np.round(rng.normal(size=2000) * 3, 2).astype(np.float32)
        sampler = Sampler(SamplingParams(**params))  # type: ignore[arg-type]
        seen = [1, 5, 77]
        sampler.observe(seen)
        ids, probabilities = sampler.distribution(logits)
        kept = {"ids": ids.tolist(), "probabilities": probabilities.tolist()}
        rows.append({"params": params, "seen": seen, "logits": logits.tolist(), **kept})
    return rows


def write_answers(out: Path, bundle: Path, backend: str = "onnx", adapter: Path | None = None) -> None:
    """Write all fixtures of a bundle's backend, with or without an adapter, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    runtime = gemma_edge.load(bundle, backend=backend, threads=1, adapter=adapter)
    tokenizer = Tokenizer(bundle, runtime.manifest)
    tokens, calls = fed(runtime)
    pinned = max(0, runtime.cache.pinned - 2)  # less than the bundle keeps
    runtime.pin(pinned)
    logits_of(runtime, tokens, calls).astype("<f4").tofile(out / "runtime.f32")
    write_rewound_state(out, runtime, tokens, calls)
    answers = {
        "bundle": str(bundle.resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
        "tokens": tokens,
        "calls": calls,
        "pinned": pinned,
        "state_calls": state_calls(calls),
        "stop_ids": sorted(tokenizer.stop_ids),
        "greedy": [{"prompt": prompt, "text": greedy(runtime, tokenizer, prompt)} for prompt in PROMPTS],
        "conversation": conversation(runtime, tokenizer, out / "conversation.safetensors"),
        "prefixed": conversation(runtime, tokenizer, out / "prefixed.safetensors", PREFIX),
        "chats": chats(runtime),
        "filters": filters(),
    }
    (out / "answers.json").write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")
