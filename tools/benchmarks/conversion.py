"""Measures peak memory, time and CPU time of converting Gemma 2, here and with the peers' tools, a process for each.

Every tool converts the 2B shape. Ours also converts half of its layers and a few layers of the 9B shape, which shows what
the peak depends on. The inputs are folders with random weights (synthetic.py), which are made in WORK where they are
missing. Bundles and models stay in WORK for gemma-bench. Nothing here says how good the results are: rounding is data-free
everywhere. peers.py installs the peers.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
from measure import Usage, describe, machine, run_measured, spread, table, versions, warm, write_json
from peers import GENAI, LLAMA_CPP_PYTHON, Genai, LlamaCpp, how_to_install
from synthetic import shape_of, write_folder

from gemma_edge.bench.machine import OtherProcesses

CONTEXT = 2048
OFFLINE = {"HF_HUB_OFFLINE": "1"}
HEADER = ("what", "peak RSS MiB", "of it anonymous", "wall s", "CPU s", "input GB", "output GB", "others' cores")


@dataclass(frozen=True)
class Job:
    """One conversion."""

    name: str
    source: Path
    output: Path
    run: Callable[[], Usage]  # converts, and returns what that has used
    missing: str = ""  # why it cannot run; "" where it can
    keep: bool = True  # whether the output stays, for gemma-bench


def size_bytes(path: Path) -> int:
    """Bytes of a file or of all files below a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _words(command: str, *values: object) -> list[str]:
    """A command line split at its spaces. Each {} is replaced by a value, which is not split."""
    given = iter(values)
    return [word.replace("{}", str(next(given))) if "{}" in word else word for word in command.split()]


def synthetic(work: Path, shape: str, layers: int | None) -> Path:
    """The folder with random weights of a shape; it is written where it is missing."""
    name = f"gemma2-{shape}-synthetic" + (f"-{layers}-layers" if layers else "")
    folder = work / name
    if not (folder / "model.safetensors.index.json").is_file():
        click.echo(f"writing {folder}", err=True)
        remove(folder)
        write_folder(folder, shape_of(shape, layers), tokenizer=None, seed=0, threads=2)
    return folder


def ours(source: Path, output: Path, group_size: int, log: Path) -> Usage:
    """gemma-export without calibration and without the gate, because no peer has one."""
    program = Path(sys.executable).parent / "gemma-export"
    command = "{} {} -o {} --target android --bits 4 --group-size {} --quality fast --context {} --verify none --force"
    return run_measured(_words(command, program, source, output, group_size, CONTEXT), log=log)


def llama_cpp(peer: LlamaCpp, source: Path, output: Path, log: Path) -> Usage:
    """Its two steps: Hugging Face to a bf16 GGUF, then Q4_0."""
    bf16 = output.with_suffix(".bf16.gguf")
    convert = _words("{} {} {} --outtype bf16 --outfile {}", peer.python, peer.convert, source, bf16)
    used = run_measured(convert, log=log, env=OFFLINE)
    if used.returncode == 0:
        quantize = _words("{} {} {} Q4_0 {}", peer.quantize, bf16, output, os.cpu_count())
        used = used.then(run_measured(quantize, log=log.with_suffix(".quantize.log")))
    remove(bf16)
    return used


def genai(peer: Genai, source: Path, output: Path, group_size: int, log: Path) -> Usage:
    """Its model builder: int4 in blocks, int8 activations, for the CPU, the tied table stored once."""
    cache = output.with_name(f"{output.name}.cache")
    command = "{} -m onnxruntime_genai.models.builder -i {} -o {} -c {} -p int4 -e cpu --extra_options block_size={}"
    options = "accuracy_level=4 op_types_to_quantize=MatMul/Gather shared_embeddings=true prune_lm_head=true"
    words = _words(f"{command} {options}", peer.python, source, output, cache, group_size)
    used = run_measured(words, log=log, env=OFFLINE)
    remove(cache)
    return used


def jobs(work: Path, peers: Path | None, small_layers: int, layers_9b: int) -> dict[str, Job]:
    """Every row of the table, in its order."""
    logs = work / "logs"
    full = work / "gemma2-2b-synthetic"
    llama, builder = LlamaCpp(peers or Path()), Genai(peers or Path())
    rows = []
    for group in (128, 32):
        out = work / f"ours-g{group}"
        rows.append(
            Job(f"ours g{group}, 2B, 26 layers", full, out, partial(ours, full, out, group, logs / f"{out.name}.log"))
        )
    for shape, layers in (("2b", small_layers), ("9b", layers_9b)):
        source = work / f"gemma2-{shape}-synthetic-{layers}-layers"
        out = work / f"ours-{shape}-{layers}-layers"
        name = f"ours g128, {shape.upper()}, {layers} layers"
        rows.append(Job(name, source, out, partial(ours, source, out, 128, logs / f"{out.name}.log"), keep=False))
    out = work / "llama-cpp-q4_0.gguf"
    run = partial(llama_cpp, llama, full, out, logs / "llama-cpp.log")
    missing = "" if peers and llama.ready else how_to_install(peers, "llama-cpp")
    rows.append(Job("llama.cpp Q4_0, 2B, 26 layers", full, out, run, missing))
    missing = "" if peers and builder.ready else how_to_install(peers, "genai")
    for group in (32, 128):
        out = work / f"genai-int4-g{group}"
        run = partial(genai, builder, full, out, group, logs / f"{out.name}.log")
        rows.append(Job(f"genai builder int4 g{group}, 2B, 26 layers", full, out, run, missing))
    return {job.output.name: job for job in rows}


@dataclass
class Result:
    """The rounds of one job."""

    name: str
    usages: list[Usage]
    others_cores: float = 0.0
    input_bytes: int = 0
    output_bytes: int = 0
    failure: str = ""

    def row(self) -> tuple[str, ...]:
        """Its line in the table."""
        if self.failure:
            return (self.name, self.failure, *[""] * (len(HEADER) - 2))
        columns = (("peak_rss_mib", 0), ("peak_anon_mib", 0), ("wall_s", 0), ("cpu_s", 0))
        cells = [spread([getattr(usage, name) for usage in self.usages], digits) for name, digits in columns]
        sizes = [f"{count / 1e9:.2f}" for count in (self.input_bytes, self.output_bytes)]
        return (self.name, *cells, *sizes, f"{self.others_cores:.2f}")


def measure_job(job: Job, result: Result) -> None:
    """Run a job once more, and add what it used to its result."""
    warm(job.source)
    remove(job.output)
    others = OtherProcesses()
    usage = job.run()
    result.others_cores = max(result.others_cores, others.cores() or 0.0)
    if usage.returncode or not job.output.exists():
        result.failure = f"failed with exit status {usage.returncode}: see {job.source.parent / 'logs'}"
        return
    click.echo(f"  peak {usage.peak_rss_mib:.0f} MiB, {usage.wall_s:.0f} s", err=True)
    result.usages.append(usage)
    result.input_bytes, result.output_bytes = size_bytes(job.source), size_bytes(job.output)


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--peers",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the peers that peers.py installed.",
)
@click.option("--only", multiple=True, help="Run only the job with this output name, such as ours-g128; repeatable.")
@click.option("--rounds", default=1, show_default=True, help="Number of rounds: in each, every job runs once.")
@click.option("--small-layers", default=13, show_default=True, help="Number of layers of the shortened 2B shape.")
@click.option("--layers-9b", default=6, show_default=True, help="Number of layers of the shortened 9B shape.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this JSON file, too.")
def main(
    work: Path, peers: Path | None, only: tuple[str, ...], rounds: int, small_layers: int, layers_9b: int,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Measure conversions. All files lie in WORK."""
    work.mkdir(parents=True, exist_ok=True)
    every = jobs(work, peers, small_layers, layers_9b)
    if unknown := set(only) - set(every):
        raise click.BadParameter(f"--only {', '.join(sorted(unknown))}; the jobs are {', '.join(every)}")
    chosen = [job for name, job in every.items() if not only or name in only]
    needed = {job.source for job in chosen if not job.missing}
    for shape, layers in (("2b", None), ("2b", small_layers), ("9b", layers_9b)):
        if any(f"gemma2-{shape}-synthetic" + (f"-{layers}-layers" if layers else "") == path.name for path in needed):
            synthetic(work, shape, layers)
    facts = {**machine(), **versions("gemma-edge", "torch", "onnxruntime"), "rounds": rounds}
    facts |= {"llama-cpp-python": LLAMA_CPP_PYTHON, "onnxruntime-genai": GENAI}
    results = [Result(job.name, [], failure=job.missing) for job in chosen]
    for _ in range(rounds):
        for job, result in zip(chosen, results, strict=True):
            if not result.failure:
                click.echo(f"converting: {job.name}", err=True)
                measure_job(job, result)
    for job in chosen:
        if not job.keep:
            remove(job.output)
    click.echo(describe(facts) + "\n")
    click.echo(table(HEADER, [result.row() for result in results]))
    write_json(json_file, {"facts": facts, "jobs": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
