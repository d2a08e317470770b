"""Measures bundles in their own runtimes beside llama.cpp's files in llama.cpp: closeness to the same original, bytes, speed.

llama-quantize makes the files from WORK/gemma3-270m-permuted-f32.gguf, with an importance matrix where it helps. Closeness is
measured by each side's own program, gemma-eval and llama-perplexity, with the same windows and the same scored positions of the
same text; each side compares with its own run of the float model, and the table's first lines show that both find the same
perplexity for it. Speed is measured by gemma-bench, all in one run. Needs what corpora.py and gemma3_270m.py write into WORK.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from plots import Point, write_plot

from gemma_edge.bench.result import load
from gemma_edge.bench.stats import METRICS, groups
from gemma_edge.bundle.manifest import Manifest

sys.path.insert(0, str(Path(__file__).parents[1]))
from corpora import CALIBRATION, EVALUATION
from gemma3_270m import FILE, FOLDER
from measure import describe, machine, spread, table, versions, write_json
from peers import LlamaCpp

WINDOW = 512
# KINDS: type of file -> whether llama-quantize is given an importance matrix.
KINDS = {"Q4_0": False, "IQ4_XS": True, "Q4_K_M": True, "Q8_0": False}
IMATRIX_CHUNKS = 16  # windows of the calibration text
# Words: of a command.
Words = list[str | Path | int]
FIGURES = {"kl": r"Mean\s+KLD:\s+(\S+)", "top1": r"Same top p:\s+(\S+)", "ppl": r"Mean PPL\(Q\)\s*:\s+(\S+)"}


@dataclass
class Row:
    """One model in one engine."""

    name: str
    engine: str
    ours: bool
    megabytes: float
    kl: float  # nats per token
    top1: float  # share of positions
    ppl: float
    prefill: list[float]  # tokens/s, one per repetition
    decode: list[float]


def run(command: Sequence[str | Path | int], **environment: str) -> str:
    """What a command prints on both outputs."""
    words = [str(word) for word in command]
    click.echo("+ " + " ".join(words), err=True)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise click.ClickException(f"{words[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def gemma(command: str, *words: str | Path | int) -> Words:
    """A command of this project, in this environment."""
    return [Path(sys.executable).parent / command, *words]


@dataclass(frozen=True)
class Comparison:
    """What both sides are measured with."""

    work: Path
    peer: LlamaCpp
    windows: int
    threads: int

    @property
    def text(self) -> Path:
        """What both read."""
        return self.work / "text" / EVALUATION

    def files(self) -> dict[str, Path]:
        """llama.cpp's files, made where they are missing."""
        folder, source = self.work / "gguf", self.work / FILE
        folder.mkdir(exist_ok=True)
        matrix = folder / "imatrix.gguf"
        if not matrix.exists():
            words = f"-c {WINDOW} --chunks {IMATRIX_CHUNKS} -ngl 0".split()
            run([self.peer.imatrix, "-m", source, "-o", matrix, "-f", self.work / "text" / CALIBRATION, *words])
        found = {kind: folder / f"{kind}.gguf" for kind in KINDS}
        for kind, path in found.items():
            if not path.exists():
                extra: Words = ["--imatrix", matrix] if KINDS[kind] else []
                run([self.peer.quantize, *extra, source, path, kind, self.threads])
        return found

    def by_llama_cpp(self, file: Path, *more: str | Path) -> str:
        """What llama-perplexity prints about a file."""
        words = f"-c {WINDOW} -b {WINDOW} --chunks {self.windows} -t {self.threads} -ngl 0".split()
        return run([self.peer.perplexity, "-m", file, "-f", self.text, *words, *more])

    def closeness_of_files(self, files: dict[str, Path]) -> tuple[float, dict[str, dict[str, float]]]:
        """Perplexity of the float model, and the figures of each file."""
        base = self.work / "gguf/float.logits"
        printed = self.by_llama_cpp(self.work / FILE, "--kl-divergence-base", base)
        found = {}
        for kind, path in files.items():
            said = self.by_llama_cpp(path, "--kl-divergence-base", base, "--kl-divergence")
            found[kind] = {name: float(_only(pattern, said)) for name, pattern in FIGURES.items()}
            found[kind]["top1"] /= 100
        base.unlink()
        return float(_only(r"Final estimate: PPL = (\S+)", printed)), found

    def closeness_of_bundles(self, bundles: Sequence[Path], backend: str) -> dict[str, Any]:
        """gemma-eval's JSON."""
        words: Words = [*bundles, "--reference", self.work / FOLDER, "--text", self.text, "--protocol", "llama.cpp"]
        sizes: Words = ["--window", WINDOW, "--max-tokens", WINDOW * self.windows, "--threads", self.threads]
        command = gemma("gemma-eval", *words, *sizes, "--backend", backend, "--json")
        click.echo("+ " + " ".join(map(str, command)), err=True)
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise click.ClickException(f"llama-perplexity printed nothing like {pattern}:\n{text[-1500:]}")
    return found[1]


def speeds(
    comparison: Comparison, bundles: Sequence[Path], files: dict[str, Path], rounds: int
) -> dict[tuple[str, str], Any]:
    """gemma-bench's results of all models, by name and engine."""
    saved = comparison.work / "end-to-end-speed.json"
    peers = [word for path in files.values() for word in ("--peer", f"llama.cpp:{path}")]
    settings: Words = ["-p", 128, "-n", 64, "-r", 3, "--rounds", rounds, "-t", comparison.threads, "--save", saved]
    path = f"{comparison.peer.bench.parent}{os.pathsep}{os.environ['PATH']}"
    click.echo(run(gemma("gemma-bench", *bundles, *peers, *settings), PATH=path))
    return {(key.model, key.backend): group for key, group in groups(load([saved])).items()}


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--peers", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of the peers."
)
@click.option(
    "--backend",
    multiple=True,
    default=("onnx", "executorch", "tflite"),
    show_default=True,
    help="Backends of the bundles; a bundle that lacks one is left out there.",
)
@click.option("--windows", default=8, show_default=True, help=f"Number of windows of {WINDOW} tokens.")
@click.option("--rounds", default=2, show_default=True, help="Rounds of gemma-bench.")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures to this JSON file, too."
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="Draw KL over bytes and over speed into this folder.",
)
def main(
    work: Path,
    bundles: tuple[Path, ...],
    peers: Path,
    backend: tuple[str, ...],
    out: Path | None,
    plots: Path | None,
    **settings: int,
) -> None:
    """Print one table of bundles and llama.cpp's files."""
    comparison = Comparison(work, LlamaCpp(peers), settings["windows"], settings["threads"])
    files = comparison.files()
    speed = speeds(comparison, bundles, files, settings["rounds"])
    original, of_files = comparison.closeness_of_files(files)
    click.echo(f"perplexity of the float model: {original:.4f} by llama.cpp")
    rows = [_row(path.name, "llama.cpp", of_files[kind], speed) for kind, path in files.items()]
    for engine in backend:
        able = [bundle for bundle in bundles if engine in Manifest.load(bundle).backends]
        evaluation = comparison.closeness_of_bundles(able, engine)
        click.echo(f"perplexity of the float model: {evaluation['reference']['ppl']:.4f} by gemma-eval")
        rows += [_row(Path(r["path"]).resolve().name, engine, r, speed) for r in evaluation["results"]]
    rows.sort(key=lambda row: row.kl)
    facts = {**machine(), **versions("gemma-edge", "onnxruntime", "executorch", "ai-edge-litert"), **settings}
    click.echo(describe(facts))
    header = (
        "model",
        "engine",
        "file, MB",
        "KL, nats",
        "same top token",
        "ppl",
        "prefill 128, tokens/s",
        "decode at 128",
    )
    click.echo(table(header, [_cells(row) for row in rows]))
    write_json(out, {"facts": facts, "rows": [asdict(row) for row in rows]})
    if plots:
        bytes_and_speed = [[row.megabytes for row in rows], [median(row.decode) for row in rows]]
        for name, title, costs in zip(
            ("bytes", "speed"), ("file, MB", "decode, tokens/s"), bytes_and_speed, strict=True
        ):
            points = [
                Point(f"{row.name}, {row.engine}", row.ours, cost, row.kl)
                for row, cost in zip(rows, costs, strict=True)
            ]
            write_plot(plots / f"end-to-end-{name}.svg", points, title)


def _row(name: str, engine: str, figures: dict[str, Any], speed: dict[tuple[str, str], Any]) -> Row:
    group = speed[name, engine]
    prefill, decode = (METRICS[f"{what}_tokens_per_s"].samples(group) for what in ("prefill", "decode"))
    closeness = {key: figures[key] for key in FIGURES}
    return Row(
        name, engine, engine != "llama.cpp", group[0].model["bytes"] / 1e6, **closeness, prefill=prefill, decode=decode
    )


def _cells(row: Row) -> tuple[str, ...]:
    shown = (
        f"{row.megabytes:.1f}",
        f"{row.kl:.4f}",
        f"{row.top1:.1%}",
        f"{row.ppl:.2f}",
        spread(row.prefill),
        spread(row.decode),
    )
    return (f"**{row.name}**" if row.ours else row.name, row.engine, *shown)


if __name__ == "__main__":
    main()
