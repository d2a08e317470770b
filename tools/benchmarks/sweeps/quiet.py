"""Measures whether a benchmark in a busy sweep finds what it finds alone: the bar is 5 % of decoding and of the prompt's speed.

    python tools/benchmarks/sweeps/quiet.py MODEL [--rounds 3] [--repeat 5] [--points "--bits 4,8 --group-size 0"]

A sweep makes the points. Then, in each round, they are timed alone, and again while another sweep with other points quantizes,
lowers and evaluates on the same machine. Both are the same command, on a store without the earlier benchmarks. The points that
are timed alone a second time show how much the figures differ by themselves: under other load they say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

BAR = 0.05
COMMAND = (sys.executable, "-c", "from gemma_edge.sweep.cli import main; main()")
SHARED = "--method rtn --backend onnx --context 512 --max-tokens 256"
OTHERS = "--bits 4 --group-size 32,64 --method mse,gptq --backend onnx --context 512 --max-tokens 1024 --no-bench"
FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def timed(command: list[str], out: Path) -> list[dict[str, Any]]:
    """The rows of a sweep whose earlier benchmarks are gone."""
    shutil.rmtree(out / "units" / "bench", ignore_errors=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def beside(command: list[str], model: str, folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """`timed` beside another sweep, and whether that one still worked at the end."""
    words = [*COMMAND, model, "-o", str(folder / "others"), *shlex.split(OTHERS)]
    shutil.rmtree(folder / "others", ignore_errors=True)
    other = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        rows = timed(command, folder / "points")
        return rows, other.poll() is None
    finally:
        other.terminate()
        other.wait()


def main() -> None:
    """Print the ratio of each point's speeds, busy and alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5, help="Repetitions of a benchmark.")
    parser.add_argument("--points", default="--bits 4,8 --group-size 0", help="Axes of the points that are timed.")
    words = parser.parse_args()
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # point, figure, alone or busy
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*COMMAND, words.model, "-o", str(folder / "points"), "--json", "-r", str(words.repeat)]
        command += [*shlex.split(SHARED), *shlex.split(words.points)]
        timed(command, folder / "points")  # makes the points
        for _ in range(words.rounds):
            runs = {"alone": timed(command, folder / "points")}
            runs["busy"], worked = beside(command, words.model, folder)
            runs["again"] = timed(command, folder / "points")
            if not worked:
                print("the other sweep ended before the last benchmark: the round counts for little", flush=True)
            for how, rows in runs.items():
                for row in rows:
                    for figure in FIGURES:
                        found[row["name"], figure, how].append(row[figure])
            print(f"load of the machine {os.getloadavg()[0]:.1f}", flush=True)
    worst = {"busy": 0.0, "again": 0.0}
    for point, figure in sorted({key[:2] for key in found}):
        alone = median(found[point, figure, "alone"])
        changes = {how: median(found[point, figure, how]) / alone - 1 for how in worst}
        worst = {how: max(worst[how], abs(changes[how])) for how in worst}
        said = ", ".join(f"{how} {change:+.1%}" for how, change in changes.items())
        print(f"{point}: {figure} {alone:.1f} alone, {said}")
    print(f"busy: {worst['busy']:.1%} at most, {'within' if worst['busy'] <= BAR else 'NOT within'} {BAR:.0%};"
          f" alone again: {worst['again']:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
