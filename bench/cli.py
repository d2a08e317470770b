"""`gemma-bench`: parses, calls bench.py, prints with bench_report.py. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.command import Command
from gemma_edge.errors import InputError
from gemma_edge.files import check_writable, need, write_whole

if TYPE_CHECKING:
    from gemma_edge.bench.bench import Contender, Plan
    from gemma_edge.bench.result import Result

PATH = click.Path(path_type=Path)
FAILED_EXIT_CODE = 1
MOST_CORES = 64  # of a phone that was not asked yet


def numbers(option: str, text: str) -> list[int]:
    """`128,512`: integers, comma-separated."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: give integers, comma-separated: 128,512") from None


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundles", nargs=-1, type=PATH, metavar="BUNDLE...")
@click.option("-p", "--prefill", metavar="N,N", default="128,512", show_default=True, help="Prompt tokens.")
@click.option("-n", "--decode", type=int, default=64, show_default=True, help="Tokens generated after it.")
@click.option("-r", "--repeat", type=int, default=5, show_default=True, help="Repetitions in one process.")
@click.option("-w", "--warmup", type=int, default=1, show_default=True, help="Repetitions that do not count.")
@click.option("-t", "--threads", metavar="N,N", help="Default: the target's, at most as many as cores.")
@click.option("--minutes", type=float, default=0.0, help="Go on repeating for this long: shows throttling.")
@click.option("--rounds", type=int, default=1, show_default=True, help="Measure everything so often, in turns.")
@click.option("--backend", help="Only this one. Default: every backend of the bundles that is installed.")
@click.option(
    "--peer", "peers", multiple=True, metavar="NAME[:MODEL]", help="llama.cpp:FILE.gguf, genai or genai:FOLDER."
)
@click.option("--device", help="adb, or adb:SERIAL: on a phone with our app on it, over adb.")
@click.option("--all-devices", is_flag=True, help="On every phone that adb sees.")
@click.option(
    "--timeout", type=float, default=900.0, show_default=True, help="Seconds a phone may take for one measurement."
)
@click.option("--keep", is_flag=True, help="Leave the bundles on the phones for the next time.")
@click.option("--from", "saved", type=PATH, multiple=True, help="Also show results that --save wrote; repeatable.")
@click.option(
    "--compare", type=PATH, nargs=2, metavar="A B", help="What changed between two saved files, beyond noise."
)
@click.option("--save", type=PATH, help="Write the results to this JSON file.")
@click.option("--html", type=PATH, help="Also write a report with plots to this file.")
@click.option("--json", "as_json", is_flag=True, help="The results as JSON on stdout instead of tables.")
@click.option("--csv", "as_csv", is_flag=True, help="One line per measurement on stdout instead of tables.")
@click.version_option(package_name="gemma-edge")
def main(
    bundles: tuple[Path, ...],
    saved: tuple[Path, ...],
    compare: tuple[Path, Path] | None,
    save: Path | None,
    html: Path | None,
    as_json: bool,
    as_csv: bool,
    **choices: Any,
) -> None:
    """Measure bundles: load time, prompt and generation speed, latencies, memory, bandwidth.

    Each measurement runs in a process of its own: a prompt of -p random tokens, then -n tokens after it, -r times.
    """
    if as_json and as_csv:
        raise InputError("--json and --csv both want stdout; give one of them, and --save FILE for the JSON")
    if compare is not None:
        return _compare(*compare, as_json=as_json)
    measuring = bool(bundles or choices["peers"] or choices["device"] or choices["all_devices"])
    if not measuring and not saved:
        raise InputError(
            "nothing to measure: give a bundle, made by gemma-export, or --from FILE to show saved results"
        )
    from gemma_edge.bench import report as bench_report
    from gemma_edge.bench import result as bench_result

    for option, file in (("--save", save), ("--html", html)):
        if file is not None:
            check_writable(option, file)
    if html is not None:
        need("--html", "matplotlib")
    earlier = bench_result.load(saved)
    results = [*earlier, *_run(bundles, **choices)] if measuring else earlier
    if save is not None:
        write_whole(save, bench_result.to_json(results))
    if html is not None:
        from gemma_edge.bench import html as bench_html

        write_whole(html, bench_html.page(results))
    if as_json:
        click.echo(bench_result.to_json(results), nl=False)
    elif as_csv:
        click.echo(bench_report.to_csv(results), nl=False)
    else:
        bench_report.print_tables(results)
    failures = [result for result in results if result.failure]
    for result in failures if as_json or as_csv else ():
        click.echo(f"{result.model['name']} ({result.model['backend']}) failed: {result.failure}", err=True)
    if failures:
        raise click.exceptions.Exit(FAILED_EXIT_CODE)


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from gemma_edge.bench import compare as bench_compare
    from gemma_edge.bench import report as bench_report
    from gemma_edge.bench import result as bench_result

    both = [bench_result.load([path]) for path in (before, after)]
    changes = bench_compare.compare(*both)
    if as_json:
        click.echo(json.dumps([{**asdict(change), "change": change.change} for change in changes], indent=1))
    else:
        bench_report.print_changes(changes)
        for path, results in zip((before, after), both, strict=True):
            if (busy := bench_report.others_cores(results)) > bench_report.BUSY_CORES:
                bench_report.say(f"{path}: other processes kept {busy:.1f} cores busy: what changed may be theirs")


def note(text: str) -> None:
    """A line for people beside the results."""
    click.echo(f"note: {text}", err=True)


@contextmanager
def _plan(bundles: tuple[Path, ...], **choices: Any) -> Iterator[Plan]:
    """What is to be measured; phones are cleaned when the block ends."""
    from gemma_edge.bench import bench

    rounds, on_phone = choices.pop("rounds"), choices["device"] is not None or choices["all_devices"]
    if rounds < 1:
        raise InputError(f"--rounds {rounds} is below 1")
    prompts, threads = numbers("-p", choices.pop("prefill")), choices.pop("threads")
    sizes = {name: choices.pop(name) for name in ("decode", "repeat", "warmup", "minutes")}
    cores = MOST_CORES if on_phone else os.cpu_count() or 1
    counts = [_default_threads(bundles, cores)] if threads is None else numbers("-t", threads)
    settings = bench.settings_of(counts, prompts, **sizes, cores=cores)
    with (_phones if on_phone else _local)(bundles, **choices) as contenders:
        yield bench.Plan(contenders, settings, rounds)


def _default_threads(bundles: tuple[Path, ...], cores: int) -> int:
    """The first bundle's target's."""
    from gemma_edge.bundle.manifest import Manifest

    return min(Manifest.load(bundles[0]).target.threads, cores) if bundles else cores


@contextmanager
def _local(
    bundles: tuple[Path, ...], *, peers: tuple[str, ...], backend: str | None, **_phones: Any
) -> Iterator[list[Contender]]:
    from gemma_edge.bench import bench
    from gemma_edge.bench import peers as bench_peers

    contenders, notes = bench.bundle_contenders(bundles, backend)
    for text in notes:
        note(text)
    yield [*contenders, *bench_peers.contenders(peers, bundles)]


@contextmanager
def _phones(
    bundles: tuple[Path, ...],
    *,
    peers: tuple[str, ...],
    backend: str | None,
    device: str | None,
    all_devices: bool,
    timeout: float,
    keep: bool,
) -> Iterator[Sequence[Contender]]:
    from gemma_edge.bench import adb, phones
    from gemma_edge.report.console import progress_bar

    kind, _, serial = (device or "adb").partition(":")
    if kind != "adb":
        raise InputError(f"--device {device}: only adb and adb:SERIAL are known; leave it out for this machine")
    if peers or not bundles:
        raise InputError("phones measure bundles, and no --peer; give a bundle")
    if backend not in (None, phones.BACKEND):
        raise InputError(f"--backend {backend}: the app on the phone runs {phones.BACKEND}; leave it out")
    if timeout <= 0:
        raise InputError(f"--timeout {timeout:g} is not above 0")
    if serial and all_devices:
        raise InputError(f"--device {device} names one phone, --all-devices all of them; give one of the two")
    found = adb.choose(adb.find_adb(), serial or None, every=all_devices, note=note)
    with phones.on_phones(found, bundles, progress_bar, answer_s=timeout, keep=keep) as contenders:
        yield contenders


def _run(bundles: tuple[Path, ...], **choices: Any) -> list[Result]:
    from gemma_edge.report.console import progress_bar

    results = []
    with _plan(bundles, **choices) as plan, progress_bar("measure", len(plan), False) as advance:
        for result in plan.run():
            results.append(result)
            advance(1)
    return results
