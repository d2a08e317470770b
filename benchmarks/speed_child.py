"""One engine, one fresh process: load a model, run the prompts and the decode loop, print one JSON line.

speed.py starts it with the engine's own interpreter, so this file imports nothing of the project at its top and takes its
arguments with argparse. Token ids are random; what is generated is thrown away.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any, Protocol

from measure import memory_mib, versions

VOCAB = range(1000, 200_000)


class Engine(Protocol):
    """The three things that are timed."""

    context: int  # tokens its KV cache is allocated for
    packages: tuple[str, ...]  # whose versions matter

    def reset(self) -> None:
        """Forget the context; not timed."""

    def prefill(self, ids: list[int]) -> int:
        """Feed a prompt, return the likeliest next token."""

    def decode(self, token: int) -> int:
        """Feed one token, return the likeliest next one."""


class Ours:
    """A bundle through `gemma_edge.load`."""

    packages: tuple[str, ...] = ("gemma-edge", "onnxruntime")

    def __init__(self, model: str, threads: int) -> None:
        import gemma_edge

        self.runtime = gemma_edge.load(model, threads=threads)
        self.context = self.runtime.manifest.cache.context

    def reset(self) -> None:
        """See Engine."""
        self.runtime.reset()

    def prefill(self, ids: list[int]) -> int:
        """See Engine."""
        return int(self.runtime.prefill(ids).argmax())

    def decode(self, token: int) -> int:
        """See Engine."""
        return int(self.runtime.decode(token).argmax())


class Genai:
    """onnxruntime-genai; its windowed cache wants room for one whole window, whatever the prompt."""

    context = 4096
    packages: tuple[str, ...] = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai  # type: ignore[import-untyped]

        self.og: Any = onnxruntime_genai
        config = self.og.Config(model)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = self.og.Model(config)
        self.generator: Any = None

    def reset(self) -> None:
        """See Engine."""
        self.generator = None  # its cache is freed before the next one is allocated
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, do_sample=False)
        self.generator = self.og.Generator(self.model, params)

    def prefill(self, ids: list[int]) -> int:
        """See Engine."""
        self.generator.append_tokens(ids)
        return self._next()

    def decode(self, token: int) -> int:
        """See Engine; it appends the token it chose itself."""
        del token
        return self._next()

    def _next(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


ENGINES: dict[str, type[Ours] | type[Genai]] = {"ours": Ours, "genai": Genai}


def measure(engine: Engine, prompts: list[int], depth: int, steps: int) -> dict[str, Any]:
    """Prefill speeds, the resident set after them, then the decode speed behind `depth` tokens."""
    draw = random.Random(0)
    engine.reset()
    engine.prefill(draw.sample(VOCAB, min(prompts)))  # warm-up, as llama-bench does
    found: dict[str, Any] = {"prefill_tokens_per_s": {}}
    for tokens in prompts:
        ids = draw.sample(VOCAB, tokens)
        engine.reset()
        start = time.perf_counter()
        engine.prefill(ids)
        found["prefill_tokens_per_s"][str(tokens)] = tokens / (time.perf_counter() - start)
    found["after_prompt_mib"] = memory_mib()
    engine.reset()
    token = engine.prefill(draw.sample(VOCAB, depth))
    for _ in range(2):
        token = engine.decode(token)
    start = time.perf_counter()
    for _ in range(steps):
        token = engine.decode(token)
    found["decode_tokens_per_s"] = steps / (time.perf_counter() - start)
    return found


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[128, 512])
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    start = time.perf_counter()
    engine: Engine = ENGINES[given.engine](given.model, given.threads)
    load_s = time.perf_counter() - start
    loaded = memory_mib()
    found = measure(engine, given.prompts, given.depth, given.steps)
    found |= {"load_s": load_s, "loaded_mib": loaded, "end_mib": memory_mib(), "context": engine.context}
    print(json.dumps({**found, "versions": versions(*engine.packages)}))


if __name__ == "__main__":
    main()
