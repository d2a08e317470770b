"""Checks that memory stays flat however long a text gets: one answer of a million tokens, and the resident memory meanwhile.

    python tools/benchmarks/endurance.py BUNDLE [--backend NAME] [--tokens 1000000]

The text is decoded and thrown away as it comes, as in a program that streams. The first twentieth is the warm-up.
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

# PARTS: how many lines are printed.
PARTS = 20


def main() -> None:
    """Print a line for each part of the answer, then how far memory moved after the first one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runtime = gemma_edge.load(options.bundle, backend=options.backend, threads=options.threads)
    tokenizer = Tokenizer(runtime.bundle, runtime.manifest)
    sampling = SamplingParams(temperature=1, top_k=40, repetition_penalty=1.1, seed=1)
    tokens = generate(runtime, tokenizer.encode("And"), GenerationOptions(max_tokens=options.tokens, sampling=sampling))
    start, characters, count, resident = time.perf_counter(), 0, 0, list[float]()

    def counted() -> int:
        nonlocal count
        count += 1
        return count

    for piece in tokenizer.stream(token for token in tokens if counted()):
        characters += len(piece)
        if count >= options.tokens * (len(resident) + 1) // PARTS:
            resident.append(memory_mib()["rss"])
            print(f"{count:9d} tokens  {time.perf_counter() - start:7.0f} s  {resident[-1]:8.2f} MiB", flush=True)
    print(
        f"{type(runtime).__name__}: {count} tokens, {characters} characters, context {runtime.cache.context};"
        f" resident {min(resident):.2f} to {max(resident):.2f} MiB, last / first {resident[-1] / resident[0] - 1:+.2%}"
    )


if __name__ == "__main__":
    main()
