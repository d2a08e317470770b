"""Measures what prompt lookup gains where a text repeats itself, and what it costs where every guess is wrong.

    python tools/benchmarks/speculate.py BUNDLE... [--backend NAME] [--tokens 200] [--repeats 5]

Plain and speculative decoding run in turns on the same bundle and prompt. The figures are median speeds.
"""

from __future__ import annotations

import argparse
from copy import copy
from pathlib import Path
from statistics import median

import gemma_edge
from gemma_edge.runtimes.engines.base import Runtime, Stats
from gemma_edge.runtimes.generation.generate import GenerationOptions, GenerationState, generate
from gemma_edge.runtimes.generation.sampling import Sampler, SamplingParams
from gemma_edge.runtimes.generation.speculate import MODES, Speculation
from gemma_edge.text.tokenizer import Tokenizer

PROMPT = "And the LORD spake unto Moses, saying, Speak unto the children of Israel, and say unto them, "
CASES = {
    "repeats": SamplingParams(),
    # at this temperature tokens are nearly random, so that what follows a repeated word is different each time
    "never repeats": SamplingParams(temperature=50, seed=1),
}


class Wrong(Speculation):
    """Guesses at every chance, and is always wrong."""

    def _guess(self) -> list[int]:
        if self._pause:
            self._pause -= 1
            return []
        return [7] * self.runtime.spare(self._width)


def decoded(runtime: Runtime, ids: list[int], params: SamplingParams, tokens: int, way: Speculation | None) -> Stats:
    """The statistics of one answer alone."""
    runtime.reset()
    before = copy(runtime.stats)
    state = GenerationState(Sampler(params), speculation=way)
    for _ in generate(runtime, ids, GenerationOptions(max_tokens=tokens), state=state):
        pass
    return Stats(**{name: value - getattr(before, name) for name, value in vars(runtime.stats).items()})


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend")
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--text", action="append", choices=CASES)
    options = parser.parse_args()
    print("| bundle | text | mode | plain tokens/s | speculating | change | guesses right |")
    print("|---|---|---|---|---|---|---|")
    for bundle in options.bundles:
        for mode in options.mode or MODES:
            runtime = gemma_edge.load(bundle, backend=options.backend, threads=options.threads)
            ids = Tokenizer(bundle, runtime.manifest).encode(PROMPT)
            for name, params in ((name, CASES[name]) for name in options.text or CASES):
                kind = Speculation if params.temperature == 0 else Wrong
                way = kind(runtime, mode)
                runs: list[list[Stats]] = [[], []]
                for _ in range(options.repeats):
                    for stats, speculation in zip(runs, (None, way), strict=True):
                        stats.append(decoded(runtime, ids, params, options.tokens, speculation))
                plain, fast = (median(run.decode_tokens_per_s for run in stats) for stats in runs)
                last = runs[1][-1]
                engine = type(runtime).__name__
                print(
                    f"| {bundle.name}, {engine} | {name} | {mode} | {plain:.4g} | {fast:.4g} | {fast / plain - 1:+.1%} |"
                    f" {last.accepted_tokens} of {last.drafted_tokens} |"
                )


if __name__ == "__main__":
    main()
