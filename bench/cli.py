"""`gemma-bench`: parses the options, measures, and shows the results. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.bundle.accelerators import ACCELERATORS
from gemma_edge.bundle.backends import ALL
from gemma_edge.command import Command, given, note
from gemma_edge.errors import InputError
from gemma_edge.files import check_writable, need, write_whole

if TYPE_CHECKING:
    from gemma_edge.bench.bench import Contender, Plan
    from gemma_edge.bench.result import Result

PATH = click.Path(path_type=Path)
FAILED_EXIT_CODE = 1
# MAX_PHONE_CORES: the limit for --threads on phones, which have not told yet how many cores they have.
MAX_PHONE_CORES = 64


@dataclass(frozen=True)
class Mode:
    """Something that `gemma-bench` does, and the parameters that have an effect on it."""

    when: str  # ends the sentence "--keep has no effect ..."
    heeds: frozenset[str]


SHOWN = frozenset({"saved", "save", "html", "as_json", "as_csv"})
MEASURED = SHOWN | {"prefill", "decode", "repeat", "warmup", "threads", "minutes", "rounds"}
COMPARE = Mode("with `compare`", frozenset({"compare", "as_json"}))
SHOW = Mode("when saved results are only shown", SHOWN)
PEERS_ONLY = Mode("on peers", MEASURED | {"peers"})
HERE = Mode("without `device` or `all_devices`", MEASURED | {"bundles", "backend", "accelerator", "peers"})
# --peer and --backend are refused or checked by _phones
PHONES = Mode("on phones", MEASURED | {"bundles", "backend", "peers", "device", "all_devices", "timeout", "keep"})


@dataclass(frozen=True)
class Choices:
    """The options of a measurement, as they were typed."""

    bundles: tuple[Path, ...]
    prefill: str
    decode: int
    repeat: int
    warmup: int
    threads: str | None
    minutes: float
    rounds: int
    backend: str | None
    accelerator: str | None
    peers: tuple[str, ...]
    device: str | None
    all_devices: bool
    timeout: float
    keep: bool

    @property
    def on_phones(self) -> bool:
        """Whether phones are measured, and not this machine."""
        return self.device is not None or self.all_devices


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundles", nargs=-1, type=PATH, metavar="BUNDLE...")
@click.option(
    "-p", "--prefill", metavar="N,N", default="128,512", show_default=True, help="Lengths of the prompt, in tokens."
)
@click.option(
    "-n", "--decode", type=int, default=64, show_default=True, help="Number of tokens generated after the prompt."
)
@click.option(
    "-r", "--repeat", type=int, default=5, show_default=True, help="Number of measured repetitions in each process."
)
@click.option(
    "-w",
    "--warmup",
    type=int,
    default=1,
    show_default=True,
    help="Number of warm-up repetitions, which are not part of the result.",
)
@click.option(
    "-t",
    "--threads",
    metavar="N,N",
    help="Numbers of threads. Default: as the first bundle's target says, but no more than there are cores.",
)
@click.option("--minutes", type=float, default=0.0, help="Repeat for this many minutes, which shows throttling.")
@click.option(
    "--rounds", type=int, default=1, show_default=True, help="Number of rounds: in each, everything is measured once."
)
@click.option(
    "--backend",
    help="Measure this backend only, or all. Default: all that are installed; on a phone the one that the app would take.",
)
@click.option(
    "--accelerator",
    help=f"What computes: {', '.join(ACCELERATORS)}. Default: what each backend was made for; cpu runs every bundle.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME[:MODEL]",
    help="Measure another program, too: llama.cpp:FILE.gguf, genai (on the bundles) or genai:FOLDER; repeatable.",
)
@click.option(
    "--device", help="Measure on a phone with the gemma-edge app: adb, or adb:SERIAL where several are connected."
)
@click.option("--all-devices", is_flag=True, help="Measure on every phone that adb sees.")
@click.option(
    "--timeout", type=float, default=900.0, show_default=True, help="Seconds that a phone may take for one measurement."
)
@click.option("--keep", is_flag=True, help="Leave the bundles on the phones for the next time.")
@click.option("--from", "saved", type=PATH, multiple=True, help="Show the results in this file, too; repeatable.")
@click.option(
    "--compare", type=PATH, nargs=2, metavar="A B", help="Show what changed between two saved files, beyond noise."
)
@click.option("--save", type=PATH, help="Write the results to this JSON file, for --from and --compare.")
@click.option("--html", type=PATH, help="Write a report with plots to this file, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout instead of tables.")
@click.option("--csv", "as_csv", is_flag=True, help="Print one CSV line per measurement on stdout instead of tables.")
@click.version_option(package_name="gemma-edge")
@click.pass_context
def main(context: click.Context, /, saved: tuple[Path, ...], compare: tuple[Path, Path] | None, **choices: Any) -> None:
    """Measure bundles: load time, speed of prompt and generation, latencies, memory, bandwidth.

    Each measurement runs in a process of its own: a prompt of -p random tokens, then -n tokens after it, -r times.
    """
    output = Output(*(choices.pop(name) for name in ("save", "html", "as_json", "as_csv")))
    requested = Choices(**choices)
    mode = mode_of(requested, saved, compare)
    refuse_unused(context, mode)
    output.check()
    if compare is not None:
        return _compare(*compare, as_json=output.as_json)
    from gemma_edge.bench import result as bench_result

    results = bench_result.load(saved)
    if mode is not SHOW:
        results += _run(requested)
    output.show(results)
    if any(result.failure for result in results):
        raise click.exceptions.Exit(FAILED_EXIT_CODE)


def mode_of(choices: Choices, saved: Sequence[Path], compare: tuple[Path, Path] | None) -> Mode:
    """What the options ask for.

    Raises:
        InputError: they ask for nothing.
    """
    if compare is not None:
        return COMPARE
    if choices.on_phones:
        return PHONES
    if choices.bundles:
        return HERE
    if choices.peers:
        return PEERS_ONLY
    if saved:
        return SHOW
    raise InputError(
        "nothing to measure: give a bundle, made by gemma-export, or --from FILE to show saved results", field="bundles"
    )


def refuse_unused(context: click.Context, mode: Mode) -> None:
    """Refuse the first parameter that was typed and that a mode does not heed.

    Raises:
        InputError: with the parameter's name.
    """
    for name in given(context):
        if name not in mode.heeds:
            raise InputError(f"`{name}` has no effect {mode.when}; leave it out", field=name)


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    save: Path | None
    html: Path | None
    as_json: bool
    as_csv: bool

    def check(self) -> None:
        """Refuse what could not be written, before any work.

        Raises:
            InputError: a file cannot be written, a package is missing, or two outputs need stdout.
        """
        if self.as_json and self.as_csv:
            raise InputError("--json and --csv both print on stdout; give one of them, and --save FILE for the JSON")
        for option, file in (("--save", self.save), ("--html", self.html)):
            if file is not None:
                check_writable(option, file)
        if self.html is not None:
            need("--html", "matplotlib")

    def show(self, results: Sequence[Result]) -> None:
        """Write the files, and print tables, JSON or CSV."""
        from gemma_edge.bench import report
        from gemma_edge.bench.result import to_json
        from gemma_edge.report import console

        if self.save is not None:
            write_whole(self.save, to_json(results))
        if self.html is not None:
            from gemma_edge.bench.html import page

            write_whole(self.html, page(results))
        if not self.as_json and not self.as_csv:
            return report.print_tables(results)
        click.echo(to_json(results) if self.as_json else report.to_csv(results), nl=False)
        for result in results:
            if result.failure:
                console.say(console.ERR, f"{result.model['name']} ({result.model['backend']}) failed: {result.failure}")


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from gemma_edge.bench import compare, report
    from gemma_edge.bench import result as bench_result
    from gemma_edge.report import console

    both = [bench_result.load([path]) for path in (before, after)]
    changes = compare.compare(*both)
    if as_json:
        click.echo(json.dumps([{**asdict(change), "change": change.change} for change in changes], indent=1))
        return
    report.print_changes(changes)
    for path, results in zip((before, after), both, strict=True):
        if (busy := report.others_cores(results)) > report.BUSY_CORES:
            console.say(console.OUT, f"{path}: other processes kept {busy:.1f} cores busy, which may be what changed")


def _run(choices: Choices) -> list[Result]:
    """Measure everything."""
    from gemma_edge.report.console import progress_bar

    results = []
    with _plan(choices) as plan, progress_bar("measure", len(plan), False) as advance:
        for result in plan.run():
            results.append(result)
            advance(1)
    return results


@contextmanager
def _plan(choices: Choices) -> Iterator[Plan]:
    """What is measured. Bundles are removed from phones when the block ends."""
    from gemma_edge.bench import bench

    if choices.rounds < 1:
        raise InputError(f"`rounds` {choices.rounds} is below 1", field="rounds", value=choices.rounds)
    cores = MAX_PHONE_CORES if choices.on_phones else os.cpu_count() or 1
    typed = choices.threads
    threads = [_default_threads(choices.bundles, cores)] if typed is None else numbers("threads", typed)
    prompts = numbers("prefill", choices.prefill)
    sweep = bench.Sweep(threads, prompts, choices.decode, choices.repeat, choices.warmup, choices.minutes)
    settings = sweep.settings(cores)
    with (_phones if choices.on_phones else _local)(choices) as contenders:
        yield bench.Plan(contenders, settings, choices.rounds)


def numbers(name: str, text: str) -> list[int]:
    """Comma-separated integers, such as `128,512`.

    Raises:
        InputError: the text of the parameter `name` is something else.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        hint = "give integers, comma-separated: 128,512"
        raise InputError(field=name, value=text, hint=hint) from None


def _default_threads(bundles: Sequence[Path], cores: int) -> int:
    """The threads of the first bundle's target, or all cores if there is no bundle."""
    from gemma_edge.bundle.manifest import Manifest

    return min(Manifest.load(bundles[0]).target.threads, cores) if bundles else cores


@contextmanager
def _local(choices: Choices) -> Iterator[Sequence[Contender]]:
    """Bundles and peers on this machine."""
    from gemma_edge.bench import bench, peers

    backend = None if choices.backend == ALL else choices.backend
    contenders, notes = bench.bundle_contenders(choices.bundles, backend, choices.accelerator)
    for text in notes:
        note(text)
    yield [*contenders, *peers.contenders(choices.peers, choices.bundles)]


@contextmanager
def _phones(choices: Choices) -> Iterator[Sequence[Contender]]:
    """Bundles on phones."""
    from gemma_edge.bench import adb, phones
    from gemma_edge.report.console import progress_bar

    kind, _, serial = (choices.device or "adb").partition(":")
    if kind != "adb":
        raise InputError(f"--device {choices.device}: only adb and adb:SERIAL are known; leave it out for this machine")
    if choices.peers or not choices.bundles:
        raise InputError("phones measure bundles, and no --peer; give a bundle")
    if choices.backend not in (None, ALL, *phones.BACKENDS):
        allowed = [*phones.BACKENDS, ALL]
        raise InputError(field="backend", value=choices.backend, allowed=allowed, hint="the app runs nothing else")
    if choices.timeout <= 0:
        raise InputError(f"--timeout {choices.timeout:g} is not above 0")
    if serial and choices.all_devices:
        raise InputError(f"--device {choices.device} names one phone, --all-devices all of them; give one of the two")
    chosen = adb.choose(adb.find_adb(), serial or None, every=choices.all_devices, note=note)
    request = phones.Request(choices.backend, answer_s=choices.timeout, keep=choices.keep)
    with phones.on_phones(chosen, choices.bundles, request, progress_bar) as contenders:
        yield contenders
