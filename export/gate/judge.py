"""The gate's second half: it runs a finished bundle without torch, in a process of its own, and compares it with saved logits.

verify.py starts it as `python -P -m gemma_edge.export.gate.judge FOLDER`, with an absolute path. The folder holds `task.json`
and the references' logits; `result.json` is written into it. Each chunk that was scored is one line on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

import gemma_edge
from gemma_edge.bundle.backends import BackendInfo, register, registered
from gemma_edge.bundle.codec import convert
from gemma_edge.command import one_line_errors
from gemma_edge.comparison import ROWS, Comparison
from gemma_edge.logits import Logits
from gemma_edge.runtimes.engines.base import Runtime

TASK, RESULT = "task.json", "result.json"
QUALITY, LOWERING = "quality.f32", "lowering.f32"  # reference logits of the task's positions, (P, V) float32


def judge(folder: Path) -> dict[str, Any]:
    """Run the bundle named by the task over its tokens and compare.

    Returns:
        what verify.py puts into the manifest: `quality`, `quality_past_context`, `lowering`, `generation_difference` and
        `judged_on`.
    """
    task = json.loads((folder / TASK).read_text())
    ids, positions = np.array(task["ids"], np.int64), np.array(task["positions"], np.int64)
    backend = convert(task["backend"], BackendInfo)
    if backend.name not in registered():  # it was registered in the process that exports, and not by an entry point
        register(backend)
    runtime = gemma_edge.load(
        task["bundle"], backend=backend.name, accelerator=task["accelerator"], adapter=task["adapter"]
    )
    chunk = runtime.cache.prefill_chunk
    generated = _generate(runtime, task["ids"][:chunk])
    quality, past, lowering, generation = Comparison(), Comparison(), Comparison(), 0.0
    start = done = 0
    for rows in runtime.score_chunks(task["ids"]):
        for position in generated.keys() & range(start, start + len(rows)):
            # np.maximum and not max: a NaN must stay
            generation = float(np.maximum(generation, np.abs(rows[position - start] - generated[position]).max()))
        inside = positions[(positions >= start) & (positions < start + len(rows))]
        for at in (inside[first : first + ROWS] for first in range(0, len(inside), ROWS)):
            logits, following = rows[at - start], ids[at + 1]
            expected = _read(folder / QUALITY, done, len(at), logits.shape[1])
            quality.add(logits, expected, following)
            beyond = at >= task["context"]
            past.add(logits[beyond], expected[beyond], following[beyond])
            same = int((at < task["lowering"]).sum())  # the first ones are compared with the same integers too
            lowering.add(logits[:same], _read(folder / LOWERING, done, same, logits.shape[1]), following[:same])
            done += len(at)
        start += len(rows)
        print(done, flush=True)  # noqa: T201 (this is the protocol)
        del rows  # 65 MB of the 2B model, not kept while the next ones are computed
    return {
        "quality": quality.to_json(),
        "quality_past_context": past.to_json() if past.tokens else None,
        "lowering": lowering.to_json(),
        "generation_difference": generation,
        "judged_on": runtime.computes_on,
    }


def _generate(runtime: Runtime, ids: list[int]) -> dict[int, Logits]:
    """Logits of the generation graph by position: a prompt, then its last tokens one by one."""
    prompt = max(1, len(ids) - 4)
    first = {prompt - 1: runtime.prefill(ids[:prompt])}
    return first | {position: runtime.decode(ids[position]) for position in range(prompt, len(ids))}


def _read(path: Path, first: int, rows: int, vocab_size: int) -> Logits:
    flat = np.fromfile(path, np.float32, rows * vocab_size, offset=4 * first * vocab_size)
    return flat.reshape(rows, vocab_size)


def main() -> None:
    """Entry point of the process."""
    folder = Path(sys.argv[1])
    try:
        with one_line_errors():
            (folder / RESULT).write_text(json.dumps(judge(folder)))
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
