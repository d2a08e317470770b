"""Load in Python what the Kotlin tests saved: `check_states.py FIXTURES`, after `mvn test`. Next logits must be the same bits."""

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
    """What follows the state is what Python computed without a break.

    Raises:
        SystemExit: it is not.
    """
    state, notes = read_state(saved)
    runtime.restore(state)
    before = answers["state_calls"]
    at = sum(answers["calls"][:before])
    if notes != {"kept": "by Kotlin"} or runtime.position != at:
        raise SystemExit(f"{saved}: notes {notes} and position {runtime.position}, {at} expected")
    found = logits_of(runtime, answers["tokens"][at:], answers["calls"][before:])
    wanted = np.fromfile(expected, "<f4").reshape(len(answers["calls"]), -1)[before:]
    if not np.array_equal(found, wanted):
        raise SystemExit(f"{saved}: the logits after it differ by up to {np.abs(found - wanted).max()}")


def check_conversation(runtime: Runtime, answers: dict[str, Any], saved: Path) -> None:
    """The last turn is answered as without a break, and feeds as little.

    Raises:
        SystemExit: it is not.
    """
    session = Session(runtime, Tokenizer(runtime.bundle, runtime.manifest), ChatTemplate.from_bundle(runtime.bundle))
    session.restore(saved)
    row = answers["conversation"][-1]
    fed = runtime.position
    answer = "".join(session.send(row["text"], GenerationOptions(max_tokens=20)))
    if (answer, runtime.position) != (row["answer"], row["position"]) or not fed:
        raise SystemExit(f"{saved}: answered {answer!r} up to {runtime.position}, {row} expected")


def main() -> None:
    """Check every bundle, and that another one's state is refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fixtures", type=Path)
    fixtures: Path = parser.parse_args().fixtures
    states: list[Path] = []
    for folder in sorted((fixtures / "models").iterdir()):
        answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        runtime = gemma_edge.load(answers["bundle"], threads=1)
        saved = fixtures / "from-kotlin" / folder.name
        check_state(runtime, answers, folder / "runtime.f32", saved / "state.safetensors")
        check_conversation(runtime, answers, saved / "conversation.safetensors")
        for foreign in states:
            try:
                runtime.restore(read_state(foreign)[0])
            except InputError:
                continue
            raise SystemExit(f"{foreign} was taken by {folder.name}")
        states.append(saved / "state.safetensors")
    print(f"states saved by Kotlin go on in Python: {len(states)} bundles")


if __name__ == "__main__":
    main()
