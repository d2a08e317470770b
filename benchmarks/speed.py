"""Load time, memory, prefill and decode speed of one model in several engines, in turns on one machine.

Reads what conversion.py left in WORK. Every round starts each engine once in a fresh process (A B C, A B C, ...), so drift of
the machine hits all alike; ratios are taken within a round, then their median. llama.cpp is measured by its own llama-bench.
Quality is not compared here: the weights are random. The engines hold different amounts of cache: see the context column.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
from conversion import size_bytes
from measure import Foreign, describe, machine, memory_mib, spread, table, warm, write_json
from peers import LLAMA_CPP_PYTHON, Genai, LlamaCpp, how_to_install

HEADER = ("engine", "file GB", "context", "load s", "RSS loaded MiB (anon + file)", "RSS after prompts MiB (anon + file)",
          "peak MiB")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What every engine does."""

    threads: int
    prompts: tuple[int, ...]
    depth: int  # tokens in the context before the decode loop
    steps: int


@dataclass(frozen=True)
class Contender:
    """One engine with its model; `missing` says why it cannot run."""

    name: str
    model: Path
    run: Callable[[Path, Plan], dict[str, Any]]
    missing: str = ""


def run_child(python: Path, engine: str, model: Path, plan: Plan) -> dict[str, Any]:
    """Our runtime or genai, through speed_child.py."""
    command = [python, Path(__file__).with_name("speed_child.py"), engine, model, "--threads", plan.threads]
    command += ["--prompts", ",".join(map(str, plan.prompts)), "--depth", plan.depth, "--steps", plan.steps]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "peak_mib": found["end_mib"]["peak"]}


def run_llama_bench(program: Path, model: Path, plan: Plan) -> dict[str, Any]:
    """llama-bench twice: the prompts, then decode behind `depth` tokens; memory is read when it announces a step."""
    prompts = ",".join(map(str, plan.prompts))
    marks, rows, peak = _llama_bench(program, model, plan, ("-p", prompts, "-n", "0"))
    first, last = "benchmark 1/", f"benchmark {len(plan.prompts)}/"
    load_s, loaded = next(seen for line, seen in marks if first in line and "warmup prompt" in line)
    _, after = next(seen for line, seen in marks if last in line and ": prompt run" in line)
    _, decode, decode_peak = _llama_bench(
        program, model, plan, ("-p", "0", "-n", str(plan.steps), "-d", str(plan.depth))
    )
    return {
        "versions": {"llama-cpp-python": LLAMA_CPP_PYTHON, "llama.cpp": decode[0]["build_commit"]},
        "load_s": load_s,
        "loaded_mib": loaded,
        "after_prompt_mib": after,
        "peak_mib": max(peak, decode_peak),
        "context": max(*plan.prompts, plan.depth + plan.steps),
        "prefill_tokens_per_s": {str(row["n_prompt"]): row["avg_ts"] for row in rows},
        "decode_tokens_per_s": decode[0]["avg_ts"],
    }


Marks = list[tuple[str, tuple[float, dict[str, float]]]]


def _llama_bench(
    program: Path, model: Path, plan: Plan, tests: tuple[str, ...]
) -> tuple[Marks, list[dict[str, Any]], float]:
    """Progress lines with seconds since the start and memory then; the results; the peak in MiB."""
    command = [str(program), "-m", str(model), "-t", str(plan.threads), *tests]
    command += ["-r", "1", "-o", "json", "--progress"]
    marks: Marks = []
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            marks.append((line, (time.perf_counter() - start, memory_mib(process.pid))))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode}: {marks[-1][0].strip() if marks else 'no output'}")
        out.seek(0)
        rows: list[dict[str, Any]] = json.load(out)
    return marks, rows, used.ru_maxrss / 1024


def contenders(work: Path, peers: Path | None) -> list[Contender]:
    """Ours in two group sizes, then the peers."""
    llama, genai = LlamaCpp(peers or Path()), Genai(peers or Path())
    python = Path(sys.executable)
    found = [
        Contender(f"ours g{group}", work / f"ours-g{group}", partial(run_child, python, "ours")) for group in (128, 32)
    ]
    missing = "" if peers and llama.ready else how_to_install(peers, "llama-cpp")
    q4_0 = work / "llama-cpp-q4_0.gguf"
    found.append(Contender("llama.cpp Q4_0", q4_0, partial(run_llama_bench, llama.bench), missing))
    missing = "" if peers and genai.ready else how_to_install(peers, "genai")
    run = partial(run_child, genai.python, "genai")
    found += [Contender(f"genai int4 g{group}", work / f"genai-int4-g{group}", run, missing) for group in (32, 128)]
    return found


@dataclass
class Result:
    """The rounds of one contender, by round number; a failed one ends it."""

    name: str
    model_bytes: int = 0
    failure: str = ""
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """One figure over the rounds."""
        return [speeds(figures)[name] if name in speeds(figures) else figures[name] for figures in self.rounds.values()]

    def memory(self, name: str) -> str:
        """Median resident set with its parts."""
        rss, anon, file = (
            median(figures[name][part] for figures in self.rounds.values()) for part in ("rss", "anon", "file")
        )
        return f"{rss:.0f} ({anon:.0f} + {file:.0f})"

    def row(self) -> tuple[str, ...]:
        """Its line in the memory table."""
        if not self.rounds:
            return (self.name, self.failure, *[""] * (len(HEADER) - 2))
        context = str(next(iter(self.rounds.values()))["context"])
        memory = (self.memory("loaded_mib"), self.memory("after_prompt_mib"), spread(self.values("peak_mib"), 0))
        return (self.name, f"{self.model_bytes / 1e9:.2f}", context, spread(self.values("load_s")), *memory)


def speeds(figures: Mapping[str, Any]) -> dict[str, float]:
    """The speeds of one round, by their column's name."""
    found = {f"prefill {tokens}": speed for tokens, speed in figures["prefill_tokens_per_s"].items()}
    return {**found, "decode": figures["decode_tokens_per_s"]}


def speed_tables(results: list[Result], plan: Plan) -> str:
    """Tokens per second, and each of ours over each peer within the rounds."""
    names = [*(f"prefill {tokens}" for tokens in plan.prompts), "decode"]
    header = ("engine", *(f"{name} tok/s" for name in names[:-1]), f"decode tok/s @{plan.depth}")
    done = [result for result in results if result.rounds]
    text = table(header, [(result.name, *(spread(result.values(name)) for name in names)) for result in done])
    ratios = []
    for own in (result for result in done if result.name.startswith("ours")):
        for peer in (result for result in done if not result.name.startswith("ours")):
            shared = sorted(own.rounds.keys() & peer.rounds.keys())
            pairs = [(speeds(own.rounds[i]), speeds(peer.rounds[i])) for i in shared]
            cells = (spread([ours[name] / theirs[name] for ours, theirs in pairs], 2) for name in names)
            ratios.append((f"{own.name} / {peer.name}", *cells))
    return text if not ratios else f"{text}\n\n{table(('ratio within a round', *names), ratios)}"


def measure_round(number: int, wanted: list[Contender], results: list[Result], plan: Plan) -> None:
    """Every contender once."""
    for contender, result in zip(wanted, results, strict=True):
        if result.failure:
            continue
        click.echo(f"round {number + 1}: {contender.name}", err=True)
        foreign = Foreign()
        try:
            figures = contender.run(contender.model, plan)
        except RuntimeError as error:
            result.failure = f"failed: {error}"
            click.echo(f"{contender.name} {result.failure}", err=True)
            continue
        result.rounds[number] = {**figures, "others_cores": foreign.cores()}


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--peers", type=click.Path(path_type=Path, exists=True, file_okay=False), help="peers.py's folder.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--prompts", default="128,512", show_default=True, help="Prompt lengths, comma-separated.")
@click.option("--depth", default=128, show_default=True, help="Tokens in the context before the decode loop.")
@click.option("--steps", default=64, show_default=True, help="Tokens decoded.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the raw figures here too.")
def main(
    work: Path, peers: Path | None, rounds: int, threads: int, prompts: str, depth: int, steps: int,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Compare the engines on the models in WORK."""
    plan = Plan(threads, tuple(int(tokens) for tokens in prompts.split(",")), depth, steps)
    facts = {**machine(), "threads": threads, "rounds": f"{rounds}, median (least-most)"}
    wanted = contenders(work, peers)
    results = []
    for contender in wanted:
        absent = (
            "" if contender.model.exists() else f"no {contender.model.name}: python benchmarks/conversion.py {work}"
        )
        results.append(Result(contender.name, failure=contender.missing or absent))
        if not results[-1].failure:
            results[-1].model_bytes = size_bytes(contender.model)
            warm(contender.model)
    for number in range(rounds):
        measure_round(number, wanted, results, plan)
    worst = max((figures["others_cores"] for result in results for figures in result.rounds.values()), default=0.0)
    for result in results:
        for figures in result.rounds.values():
            facts[f"{result.name} ran"] = [f"{package} {version}" for package, version in figures["versions"].items()]
    facts["others' cores"] = f"{worst:.2f} at worst; above 0.1 the figures are not to be quoted"
    click.echo(describe(facts) + "\n\n" + table(HEADER, [result.row() for result in results]))
    click.echo("\n" + speed_tables(results, plan))
    raw = [{"engine": r.name, "failure": r.failure, "bytes": r.model_bytes, "rounds": r.rounds} for r in results]
    write_json(json_file, {"facts": facts, "engines": raw})


if __name__ == "__main__":
    main()
