"""The gate: a finished bundle, opened in its own runtime, against the original on held-out text and past the window's wrap.

Two comparisons. *Quality*: against the float checkpoint; what quantization costs. *Lowering*: against the very same integers,
dequantized in torch with a float cache; what the exporter and the runtime add, which is the runtime's int8 activations, the
rounding of an int8 KV cache, and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from gemma_edge.bundle.backends import RUNTIMES
from gemma_edge.errors import InputError
from gemma_edge.export.gate import judge
from gemma_edge.export.gate.limits import LEVELS, LOWERING_TEXT, Limits, failures
from gemma_edge.memory import give_back
from gemma_edge.model import layerwise as reference
from gemma_edge.model.checkpoint import Weights
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.text import corpus
from gemma_edge.text.tokenizer import WAY_OUT, open_tokenizer


@dataclass(frozen=True)
class Gate:
    """Which tokens are fed and which positions are compared."""

    level: str
    text: str
    ids: list[int]
    positions: list[int]


def make_gate(tokenizer: Path | None, vocab_size: int, bos: int, context: int, level: str) -> Gate:
    """Choose the tokens for a level of LEVELS; not for "none"."""
    chosen = LEVELS[level]
    assert chosen is not None, "nothing is chosen for a gate that is not run"
    ids = [bos, *_tokens(tokenizer, vocab_size, chosen.tokens(context) - 1)]
    text = ", ".join(corpus.HELD_OUT) if tokenizer else "random tokens: the model has no tokenizer"
    return Gate(level, text, ids, chosen.positions(context))


def _tokens(tokenizer: Path | None, vocab_size: int, count: int) -> list[int]:
    if tokenizer is None:
        return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, count)]
    # Half of the tokens come from each text, so that no book decides alone. Only the beginning of each text is encoded.
    encoder, half = open_tokenizer(tokenizer, WAY_OUT), count // 2
    texts = [corpus.read(name)[: corpus.CHARACTERS_PER_TOKEN * (count - half)] for name in corpus.HELD_OUT]
    halves = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
    ids = [*halves[0][:half], *halves[1][: count - half]]
    if max(ids) >= vocab_size:
        raise InputError(
            f"{tokenizer} gives token id {max(ids)}, the model has a vocabulary of {vocab_size}; {WAY_OUT}"
        )
    return ids


def verify(
    bundle: Path,
    original: Weights,
    quantized: QuantizedCheckpoint,
    gate: Gate,
    *,
    context: int,
    limits: Mapping[str, Limits],
    pythons: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Run the gate on every backend of a bundle; the references are computed once.

    Args:
        bundle: the finished folder.
        original: the float checkpoint.
        quantized: the integers that were lowered.
        gate: from `make_gate`.
        context: of the bundle.
        limits: by backend, what it must reach: of its fewest bits.
        pythons: by backend, what runs it, where that is not this Python.
        progress: called with 1 per layer of the two references and per chunk of each backend: see `steps`.

    Returns:
        `verification` of the manifest: by backend, what was found; `passed` tells.

    Raises:
        RuntimeError: the bundle could not be run.
    """
    with TemporaryDirectory(dir=bundle.parent, prefix=".gate-") as name:
        folder = Path(name)
        ids, first = torch.tensor(gate.ids), [p for p in gate.positions if p < LOWERING_TEXT]
        hidden = reference.hidden_states(original, ids, context, progress)
        reference.write_logits(original, hidden[gate.positions], folder / judge.QUALITY)
        hidden = reference.hidden_states(quantized, ids[:LOWERING_TEXT], context, progress)
        reference.write_logits(quantized, hidden[first], folder / judge.LOWERING)
        del hidden
        task = {
            "bundle": str(bundle),
            "ids": gate.ids,
            "positions": gate.positions,
            "lowering": LOWERING_TEXT,
            "context": context,
        }
        results = {}
        for backend, limit in limits.items():
            (folder / judge.TASK).write_text(json.dumps({**task, "backend": backend}))
            result = {
                "level": gate.level,
                "text": gate.text,
                "fed_tokens": len(gate.ids),
                "past_wrap": len(gate.ids) > context,
                **_judge(folder, progress, (pythons or {}).get(backend, sys.executable)),
                "limits": asdict(limit),
            }
            found = failures(result, limit)
            results[backend] = {**result, "failures": found, "passed": not found}
    return results


def cannot_judge(python: str, backend: str) -> str | None:
    """Why a Python cannot run the gate of a backend; None where it can."""
    command = [python, "-c", f"import {judge.__name__}, {RUNTIMES[backend][0]}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return error.strerror
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1] if done.returncode else None


def _judge(folder: Path, progress: Callable[[int], None], python: str) -> dict[str, Any]:
    """The bundle's half in a fresh process: it shares no memory with torch, as on the device."""
    command = [python, "-m", judge.__name__, str(folder)]
    log = folder / "stderr"
    give_back()
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for _ in process.stdout:
                progress(1)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        said = log.read_text().strip() or f"exit code {process.returncode}"
        raise RuntimeError(f"the finished bundle does not run: {said.splitlines()[-1]}")
    found: dict[str, Any] = json.loads((folder / judge.RESULT).read_text())
    return found


def steps(layers: int, tokens: int, chunk: int, backends: int) -> int:
    """How often `verify` reports progress."""
    return 2 * layers + backends * -(-tokens // chunk)
