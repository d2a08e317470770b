"""Measures how far 4-bit weights are from the float model: ours and every peer's, on one real model and the same tokens.

The measure is KL(float || quantized) per token, in nats, which tells apart what perplexity on few tokens cannot. Activations
stay float32. With smollm2 only the linears are quantized, by functions of the package. With gemma3-270m the tool itself makes
the integers, those of the table too; llama.cpp's files are judged as they are, and to peers that quantize linears alone a table
of 8 bits costs nothing. All calibrated contenders see the same windows of text from other domains, and other windows for every
draw. Peers run in their own interpreters (quality_child.py). A peer that is not installed is named and left out. Needs what
smollm2.py or gemma3_270m.py, and corpora.py, write into WORK. Scores are saved in WORK/quality-cache.json, under a hash of
everything that they depend on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import click
import quality_child
import quality_gemma
import quality_judge
import quality_ours
import torch
from plots import Point, write_plot
from quality_child import PEERS, Peer
from quality_judge import WINDOW, Judge, Made, Score, cut, linears
from quality_ours import Bar, Contender
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from gemma_edge.bundle.codec import convert
from gemma_edge.files import write_whole

sys.path.insert(0, str(Path(__file__).parents[1]))
import gemma3_270m
import smollm2
from corpora import CALIBRATION, EVALUATION
from measure import describe, machine, table, versions, write_json


@dataclass(frozen=True)
class Subject:
    """A model to measure on."""

    folder: str  # below WORK
    script: str  # makes it
    contenders: Callable[
        [Path | None], Mapping[str, Contender]
    ]  # of the folder of peers, besides those of quality_child.py
    quantized: str  # heads the table


SUBJECTS = {
    "smollm2": Subject(smollm2.FOLDER, "smollm2.py", lambda peers: quality_ours.OURS, "4-bit linears"),
    "gemma3-270m": Subject(gemma3_270m.FOLDER, "gemma3_270m.py", quality_gemma.contenders, "linears and table"),
}


@dataclass(frozen=True)
class Row:
    """A contender's scores, one per draw; one alone if it needs no data."""

    peer: bool
    calibrated: bool
    scores: list[Score]
    bar: Bar | None = None

    @property
    def kl(self) -> float:
        """Mean over the draws."""
        return mean(score.kl for score in self.scores)

    def megabytes(self, linears: int, table: int) -> float:
        """Size of the weights, from how many weights the linears and the table have."""
        made = self.scores[0].made
        return (linears * made.weight_bits + table * made.table_bits) / 8e6


class Cache:
    """Scores in a JSON file, by a hash of everything that they depend on."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self.fresh = fresh

    def saved(self) -> dict[str, Any]:
        """What the file contains now, because another run may have added to it."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def score(self, key: str, judge: Judge, change: Callable[[], Made]) -> Score:
        """The saved score, or else the score of the model after `change`."""
        saved = self.saved()
        if not self.fresh and key in saved:
            return convert(saved[key], Score)
        _ = judge.reference  # computed while the model is still the float one
        score = judge.score(change())
        judge.restore()
        write_whole(self.path, json.dumps({**self.saved(), key: asdict(score)}, indent=1) + "\n")
        return score


def digest(*parts: bytes | str) -> str:
    """A short hash of several texts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return total.hexdigest()[:24]


def sources(*modules: ModuleType) -> str:
    """The code of modules, and of all files of packages, without comments and layout."""
    files: list[Path] = []
    for module in modules:
        file = Path(module.__file__ or "")
        files += sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return "".join(ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files)


def installed(peer: Peer, root: Path) -> dict[str, str]:
    """The versions of a peer's packages; {} if one is missing."""
    places = [str(path) for path in (root / peer.home).glob("venv/lib/python*/site-packages")]
    versions = {name: d.version for name in peer.packages for d in Distribution.discover(name=name, path=places)}
    return versions if len(versions) == len(peer.packages) else {}


def run_peer(name: str, root: Path, folder: Path, windows: Tensor, judge: Judge) -> Made:
    """Put the linears that a peer has quantized into the model."""
    with tempfile.TemporaryDirectory() as place:
        out, data = Path(place, "out.safetensors"), Path(place, "windows.safetensors")
        save_file({"windows": windows}, data)
        script, python = Path(quality_child.__file__), (root / PEERS[name].home / "venv/bin/python").absolute()
        paths = {"--model": folder.absolute(), "--windows": data, "--out": out}
        command = [str(python), str(script), name, *(str(part) for item in paths.items() for part in item)]
        # A thread that waits must not spin: that would be counted as work.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
        rounded, weights = load_file(out), linears(judge.model)
        with safe_open(out, "pt") as file:
            cpu_s = float(file.metadata()["cpu_s"])
    if rounded.keys() != weights.keys():
        raise RuntimeError(f"{name} returned {len(rounded)} linears; the model has {len(weights)}")
    for key, weight in weights.items():
        weight.copy_(rounded[key])
    return Made(cpu_s, PEERS[name].weight_bits)


@dataclass(frozen=True)
class Bench:
    """What all contenders share."""

    folder: Path
    contenders: Mapping[str, Contender]
    peers: Path | None
    judge: Judge
    draws: list[Tensor]  # calibration windows, (N, WINDOW) each
    cache: Cache
    inputs: str  # hash of model and evaluation windows

    def _scores(self, calibrated: bool, origin: Sequence[bytes | str], change: Callable[[Tensor], Made]) -> list[Score]:
        scores = []
        for windows in self.draws if calibrated else self.draws[:1]:
            key = digest(self.inputs, *origin, windows.numpy().tobytes() if calibrated else b"")
            scores.append(self.cache.score(key, self.judge, lambda windows=windows: change(windows)))  # type: ignore[misc]
        return scores

    def peer(self, name: str) -> Row | None:
        """The row of a peer; None where it is not installed."""
        peer = PEERS[name]
        packages = installed(peer, self.peers) if self.peers else {}
        if self.peers is None or not packages:
            return None
        root = self.peers
        origin = (name, json.dumps(packages), sources(quality_child))
        scores = self._scores(peer.calibrated, origin, lambda w: run_peer(name, root, self.folder, w, self.judge))
        return Row(True, peer.calibrated, scores)

    def ours(self, name: str) -> Row:
        """The row of one of our contenders, or of a file of llama.cpp's."""
        contender = self.contenders[name]
        product = () if contender.peer else map(importlib.import_module, ("gemma_edge.quantize", "gemma_edge.model"))
        origin = (name, sources(quality_ours, quality_gemma, *product))
        scores = self._scores(contender.calibrated, origin, lambda w: contender.run(self.judge.model, w))
        return Row(contender.peer, contender.calibrated, scores, contender.bar)


def _mean_and_range(values: Sequence[float]) -> str:
    text = f"{mean(values):.4f}"
    return text if len(values) == 1 else f"{text} ({min(values):.4f}-{max(values):.4f})"


def weight_counts(judge: Judge) -> tuple[int, int]:
    """How many weights the linears have together, and the table."""
    weights = sum(weight.numel() for weight in linears(judge.model).values())
    return weights, judge.model.get_parameter("model.embed_tokens.weight").numel()


def as_table(rows: Mapping[str, Row], judge: Judge, title: str) -> str:
    """A table of the rows, the best first, ours in bold."""
    peers = [row.kl for row in rows.values() if row.peer]
    sizes = weight_counts(judge)
    header = (
        title,
        "bits/weight",
        "table",
        "weights, MB",
        "KL, nats: mean (range)",
        "/ best peer",
        "same top token",
        "ppl",
        "CPU, s",
    )
    cells = [
        (
            name if row.peer else f"**{name}**",
            f"{row.scores[0].made.weight_bits:.2f}",
            f"{row.scores[0].made.table_bits:.2f}",
            f"{row.megabytes(*sizes):.1f}",
            _mean_and_range([score.kl for score in row.scores]),
            f"{row.kl / min(peers):.2f}" if peers else "-",
            f"{mean(score.top1 for score in row.scores):.1%}",
            f"{mean(score.ppl for score in row.scores):.2f}",
            f"{mean(score.made.cpu_s for score in row.scores):.0f}",
        )
        for name, row in sorted(rows.items(), key=lambda item: item[1].kl)
    ]
    return table(header, cells)


def plotted(rows: Mapping[str, Row]) -> list[Point]:
    """The contenders between which it is hard to choose: neither 8-bit linears nor a table of 4 bits."""
    points = []
    for name, row in rows.items():
        made = row.scores[0].made
        if made.weight_bits < 8 and made.table_bits >= 8:
            points.append(Point(name, not row.peer, made.weight_bits, row.kl))
    return points


def verdicts(rows: Mapping[str, Row]) -> list[str]:
    """One line for each of our contenders that has a bar to reach."""
    lines = []
    for name, row in rows.items():
        bar = row.bar
        rivals = [r for r in rows.values() if r.peer and not (bar and bar.data_free and r.calibrated)]
        if bar and rivals:
            best = min(rival.kl for rival in rivals)
            against = f"{bar.limit:.2f} x the best peer{' without data' if bar.data_free else ''}"
            lines.append(
                f"{name}: {row.kl / best:.2f}; bar {against}: {'met' if row.kl <= bar.limit * best else 'MISSED'}"
            )
    return lines


def prepare(
    work: Path, subject: Subject, peers: Path | None, *, windows: int, draws: int, calibration: int, fresh: bool
) -> Bench:
    """Load the model and cut the windows."""
    folder, text = work / subject.folder, work / "text"
    needed = {folder / "config.json": subject.script, text / EVALUATION: "corpora.py", text / CALIBRATION: "corpora.py"}
    for path, script in needed.items():
        if not path.is_file():
            raise click.ClickException(f"{path} is missing: python tools/benchmarks/{script} {work}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = json.loads((folder / "config.json").read_text())["bos_token_id"]

    def ids(name: str) -> list[int]:
        tokens: list[int] = tokenizer.encode((text / name).read_text(encoding="utf-8"), add_special_tokens=False).ids
        return tokens

    evaluation = cut(ids(EVALUATION), bos, count=windows, length=WINDOW + 1)
    calibration_ids = ids(CALIBRATION)
    data = [cut(calibration_ids, bos, count=calibration, length=WINDOW, seed=seed) for seed in range(draws)]
    model = b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))
    inputs = digest(model, evaluation.numpy().tobytes(), sources(quality_judge))
    cache = Cache(work / "quality-cache.json", fresh=fresh)
    return Bench(folder, subject.contenders(peers), peers, Judge(folder, evaluation), data, cache, inputs)


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--model", type=click.Choice(list(SUBJECTS)), default="smollm2", show_default=True)
@click.option(
    "--peers",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the peers that peers.py installed.",
)
@click.option("--only", multiple=True, help="Measure only contenders whose name contains this; repeatable.")
@click.option("--windows", default=20, show_default=True, help=f"Number of evaluation windows of {WINDOW} positions.")
@click.option("--draws", default=3, show_default=True, help="Number of draws of calibration windows.")
@click.option(
    "--calibration",
    default=32,
    show_default=True,
    help=f"Number of calibration windows of {WINDOW} tokens in each draw.",
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw KL over bits into this SVG file.")
@click.option("--fresh", is_flag=True, help="Measure again what has a saved score.")
@click.option(
    "--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures to this JSON file, too."
)
@torch.no_grad()
def main(
    work: Path,
    model: str,
    peers: Path | None,
    only: tuple[str, ...],
    out: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Print one table of our contenders and the peers."""
    subject = SUBJECTS[model]
    bench = prepare(work, subject, peers, **settings)
    rows: dict[str, Row] = {}
    for name in [*PEERS, *bench.contenders]:
        if only and not any(part in name for part in only):
            continue
        row = bench.peer(name) if name in PEERS else bench.ours(name)
        if row is None:
            click.echo(
                f"{name}: not installed: python tools/benchmarks/peers.py FOLDER --only {PEERS[name].home}", err=True
            )
            continue
        rows[name] = row
        click.echo(f"{name}: KL {_mean_and_range([score.kl for score in row.scores])}", err=True)
    used = {k: v for name in rows if name in PEERS and peers for k, v in installed(PEERS[name], peers).items()}
    facts = {"model": model, **machine(), **versions("gemma-edge", "torch", "transformers"), "peers": used, **settings}
    click.echo(describe(facts))
    click.echo(as_table(rows, bench.judge, subject.quantized))
    for line in verdicts(rows):
        click.echo(line)
    write_json(out, {"facts": facts, "rows": {name: asdict(row) for name, row in rows.items()}})
    if plot is not None:
        write_plot(plot, plotted(rows), "bits per weight of the linears, beside a table of 8 bits")


if __name__ == "__main__":
    main()
