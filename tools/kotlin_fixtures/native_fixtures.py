"""Write Python's answers for the engines on Android's own libraries: `native_fixtures.py OUT BUNDLE`.

`make android-native-test` runs it. Each backend has two folders. `OUT/BACKEND` is for the tests that want Python's bits. The
logits in `OUT/text/BACKEND` are those of a real text, whose most likely tokens do not depend on how kernels round.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import model_fixtures

import gemma_edge
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.text.tokenizer import Tokenizer

TEXT = Path(gemma_edge.__file__).parent / "text" / "data" / "heldout_austen.txt"
STEPS = 20  # single tokens past the end of the context


def write_text_logits(out: Path, answers: Path, bundle: Path, backend: str) -> None:
    """Write the logits of a real text in uneven chunks, past the end of the context.

    Args:
        out: the folder to write into.
        answers: a folder of `model_fixtures`, for what the Kotlin tests read besides.
        bundle: the bundle.
        backend: its backend.
    """
    out.mkdir(parents=True)
    rest = json.loads((answers / "answers.json").read_text(encoding="utf-8"))
    runtime = gemma_edge.load(bundle, backend=backend, threads=1)
    runtime.pin(rest["pinned"])
    context, chunk = runtime.cache.context, runtime.cache.prefill_chunk
    calls = [1, 3, chunk, 2 * chunk + 3, 5, chunk - 1]
    calls += [context - sum(calls), *[1] * STEPS]
    text = TEXT.read_text(encoding="utf-8")
    tokens = Tokenizer(bundle, runtime.manifest).encode(text[: 10 * context])[: sum(calls)]
    model_fixtures.logits_of(runtime, tokens, calls).astype("<f4").tofile(out / "runtime.f32")
    rest |= {"tokens": tokens, "calls": calls, "state_calls": 1}
    (out / "answers.json").write_text(json.dumps(rest, ensure_ascii=False), encoding="utf-8")


def main(out: Path, bundle: Path) -> None:
    """Write the fixtures of every backend of a bundle."""
    for backend in Manifest.load(bundle).backends:
        answers = out / backend / "models" / bundle.name
        model_fixtures.write_answers(answers, bundle, backend)
        write_text_logits(out / "text" / backend / "models" / bundle.name, answers, bundle, backend)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
