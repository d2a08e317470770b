"""Whether memory stays flat however long a text gets: one answer of a million tokens, resident memory all along.

    python tools/benchmarks/endurance.py BUNDLE [--backend NAME] [--tokens 1000000]

Text is decoded and thrown away as it comes, as a program that streams would. The first twentieth is the warm-up.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gemma_edge
from gemma_edge.memory import memory_mib
from gemma_edge.runtimes.generation.generate import GenerationOptions, generate
from gemma_edge.runtimes.generation.sampling import SamplingParams
from gemma_edge.text.tokenizer import Tokenizer

PARTS = 20


def main() -> None:
    """Print a line for each twentieth, then what memory did after the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    runtime = gemma_edge.load(asked.bundle, backend=asked.backend, threads=asked.threads)
    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    sampling = SamplingParams(temperature=1, top_k=40, repetition_penalty=1.1, seed=1)
    tokens = generate(runtime, tokenizer.encode("And"), GenerationOptions(max_tokens=asked.tokens, sampling=sampling))
    start, characters, seen, found = time.perf_counter(), 0, 0, list[float]()

    def counted() -> int:
        nonlocal seen
        seen += 1
        return seen

    for piece in tokenizer.stream(token for token in tokens if counted()):
        characters += len(piece)
        if seen >= asked.tokens * (len(found) + 1) // PARTS:
            found.append(memory_mib()["rss"])
            print(f"{seen:9d} tokens  {time.perf_counter() - start:7.0f} s  {found[-1]:8.2f} MiB", flush=True)
    print(
        f"{type(runtime).__name__}: {seen} tokens, {characters} characters, context {runtime.cache.context};"
        f" resident {min(found):.2f} to {max(found):.2f} MiB, last / first {found[-1] / found[0] - 1:+.2%}"
    )


if __name__ == "__main__":
    main()
