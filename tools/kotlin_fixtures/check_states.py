"""Load in Python the states that the Kotlin tests saved, and require the same bits of the logits that follow.

Run it after the Kotlin tests: `check_states.py FIXTURES [--backend NAME]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from model_fixtures import logits_of

import gemma_edge
from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.base import Runtime
from gemma_edge.runtimes.engines.state import read_state
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.generation.session import Session
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer


def check_state(runtime: Runtime, answers: dict[str, Any], expected: Path, saved: Path) -> None:
    """Check that the logits after a saved state are those after the state that Python saved at the same place.

    Args:
        runtime: of the bundle.
        answers: the fixtures of the bundle, from answers.json.
        expected: file with these logits after every call that follows, (calls, V) float32.
        saved: file with the state that Kotlin saved.

    Raises:
        SystemExit: the notes, the position, what is pinned or the logits differ.
    """
    state, notes = read_state(saved)
    runtime.restore(state)
    before = answers["state_calls"]
    at = sum(answers["calls"][:before])
    if notes != {"kept": "by Kotlin"} or (runtime.position, runtime.pinned) != (at, answers["pinned"]):
        found = f"notes {notes}, position {runtime.position} and {runtime.pinned} pinned tokens"
        raise SystemExit(f"{saved}: {found}; {at} and {answers['pinned']} expected")
    logits = logits_of(runtime, answers["tokens"][at:], answers["calls"][before:])
    pythons = np.fromfile(expected, "<f4").reshape(logits.shape)
    if not np.array_equal(logits, pythons):
        raise SystemExit(f"{saved}: the logits after it differ by up to {np.abs(logits - pythons).max()}")


def check_conversation(runtime: Runtime, answers: dict[str, Any], saved: Path) -> None:
    """Check that a saved conversation goes on with the answer, and the number of tokens fed, of one without a break.

    Raises:
        SystemExit: the answer or the position differs.
    """
    session = Session(runtime, Tokenizer(runtime.bundle, runtime.manifest), ChatTemplate.from_bundle(runtime.bundle))
    session.restore(saved)
    row = answers["conversation"][-1]
    fed = runtime.position
    answer = "".join(session.send(row["text"], GenerationOptions(max_tokens=20)))
    if (answer, runtime.position) != (row["answer"], row["position"]) or not fed:
        raise SystemExit(f"{saved}: answered {answer!r} up to {runtime.position}, {row} expected")


def main() -> None:
    """Check the states of every bundle, and that a bundle refuses the state of another one, or of another adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("--backend", help="backend of the bundles; default: the first that is installed")
    options = parser.parse_args()
    fixtures: Path = options.fixtures
    states: list[Path] = []
    for folder in sorted([*fixtures.glob("models/*"), *fixtures.glob("adapters/*")]):
        answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        runtime = gemma_edge.load(answers["bundle"], backend=options.backend, threads=1, adapter=answers["adapter"])
        saved = fixtures / "from-kotlin" / folder.name
        check_state(runtime, answers, folder / "state.f32", saved / "state.safetensors")
        check_conversation(runtime, answers, saved / "conversation.safetensors")
        for foreign in states:
            try:
                runtime.restore(read_state(foreign)[0])
            except InputError:
                continue
            raise SystemExit(f"{folder.name} accepted {foreign}, the state of another bundle or adapter")
        states.append(saved / "state.safetensors")
    print(f"{options.backend or 'onnx'}: states saved by Kotlin go on in Python: {len(states)} bundles and adapters")


if __name__ == "__main__":
    main()
