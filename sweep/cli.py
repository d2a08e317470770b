"""`gemma-sweep`: parses the options, runs the sweep, and shows the result. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma_edge.bench.cli import numbers
from gemma_edge.bench.result import Settings
from gemma_edge.command import Command, DefaultGroup, clean_up_when_ended, given
from gemma_edge.errors import InputError
from gemma_edge.export.gate.limits import LEVELS
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.room import need_torch
from gemma_edge.export.targets import TARGETS
from gemma_edge.files import write_whole
from gemma_edge.model.hub import DEFAULT_MODEL
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.sweep.options import PICKS, Limits, Measuring, SweepOptions, Where
from gemma_edge.sweep.space import AXES, read_space, values

PATH = click.Path(path_type=Path)
HTML = "sweep.html"
UNITS_OF_BYTES = "such as 1.5GB or 2GiB"
F = Callable[..., None]


def _axes(command: F) -> F:
    """An option with a list for every axis."""
    for name, axis in reversed(AXES.items()):
        supported = f" Supported: {', '.join(map(str, axis.allowed))}." if axis.allowed else ""
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, metavar="V,V", help=f"{axis.help}{supported}")(command)
    return command


# FIRST, REST: arguments and options of a sweep, before and after those of its axes
FIRST = (
    click.argument("model", default=DEFAULT_MODEL),
    click.option(
        "-o", "--out", type=PATH, required=True, help="The sweep's folder: table, page, picked bundle, units."
    ),
)
REST = (
    click.option("--space", type=PATH, help="TOML file with the same lists, such as bits = [4, 8]."),
    click.option("--budget", type=int, metavar="N", help="Try N points: on few tokens first, the best third on more."),
    click.option("--max-size", help=f"Largest size of the weights, {UNITS_OF_BYTES}."),
    click.option("--max-ram", help=f"Most memory on the device, as planned, {UNITS_OF_BYTES}."),
    click.option("--max-kl", type=float, help="Largest KL divergence to the original, in nats per token."),
    click.option("--min-decode", type=float, help="Slowest decoding, in tokens per second."),
    click.option("--pick", help=f"Publish the best bundle within the limits, by {', '.join(PICKS)}."),
    click.option(
        "--verify", default="quick", show_default=True, help=f"How the picked bundle is judged: {', '.join(LEVELS)}."
    ),
    click.option("--target", default="android", show_default=True, help=f"Class of devices: {', '.join(TARGETS)}."),
    click.option("--ram", "ram_gib", type=float, help="GiB of memory that the app may take. Default: the target's."),
    click.option(
        "--calibration", "calibration_text", type=PATH, multiple=True, help="Text to calibrate on; repeatable."
    ),
    click.option("--calibration-chat", is_flag=True, help="Put plain calibration text into chat form, for -it models."),
    click.option("--text", "texts", type=PATH, multiple=True, help="UTF-8 file to evaluate on; repeatable."),
    click.option("--max-tokens", type=int, default=4096, show_default=True, help="Tokens of an evaluation."),
    click.option("--no-bench", is_flag=True, help="Time nothing."),
    click.option("-p", "--prefill", type=int, default=128, show_default=True, help="Tokens of a benchmark's prompt."),
    click.option("-n", "--decode", type=int, default=64, show_default=True, help="Tokens generated after it."),
    click.option("-r", "--repeat", type=int, default=5, show_default=True, help="Repetitions that count."),
    click.option(
        "-t", "--threads", type=int, help="Threads of a benchmark. Default: the target's, at most this machine's cores."
    ),
    click.option("--phones", metavar="all|SERIAL,...", help="Time every bundle on these phones, too."),
    click.option(
        "--address", help="Address of a Dask scheduler. Default: this machine, for as long as the sweep lasts."
    ),
    click.option("--store", help="Folder or URL that every node reaches, for the units' results. Default: in DIR."),
    click.option(
        "--split",
        is_flag=True,
        help="Let idle nodes of the cluster help with a calibration; for models of billions of weights.",
    ),
    click.option("--cores", type=int, default=1, show_default=True, help="Cores of one quantization or evaluation."),
    click.option(
        "--retries", type=int, default=2, show_default=True, help="How often work that was lost is tried again."
    ),
)


def _sweeping(command: F) -> F:
    """The arguments and options that every command on a sweep has."""
    for option in reversed(REST):
        command = option(command)
    command = _axes(command)
    for option in reversed(FIRST):
        command = option(command)
    return command


@click.group(cls=DefaultGroup, default="run", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-edge")
def main() -> None:
    """Find the best bundle under constraints: gemma-sweep [MODEL] -o DIR --bits 4,8 --group-size 32,128.

    `gemma-sweep run --help` lists every option of a sweep.
    """


@main.command(cls=Command)
@_sweeping
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of tables.")
@click.pass_context
def run(context: click.Context, /, as_json: bool, **choices: Any) -> None:
    """Export MODEL in every combination of the lists, and measure each (the default command)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, here and in every unit
    clean_up_when_ended()
    need_torch()
    _need_extra()
    options = _options(context, choices)
    from gemma_edge.report.console import progress_bar
    from gemma_edge.sweep import html, report
    from gemma_edge.sweep.result import to_json
    from gemma_edge.sweep.sweep import sweep

    result = sweep(options, progress_bar)
    write_whole(options.out / HTML, html.page(result))
    if as_json:
        click.echo(to_json(result), nl=False)
    else:
        report.print_tables(result)


@main.command(cls=Command)
@_sweeping
@click.option(
    "--nodes", default="1,2,4", show_default=True, help="Numbers of nodes, each working on one unit at a time."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a table.")
@click.pass_context
def plan(context: click.Context, /, nodes: str, as_json: bool, **choices: Any) -> None:
    """Predict how much work a sweep of MODEL is, and how long clusters would take at least; nothing is computed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    need_torch()
    _need_extra()
    counts = numbers("nodes", nodes)
    if min(counts) < 1:
        raise InputError(f"`nodes` {nodes}: a cluster has at least one node", field="nodes", value=nodes)
    options = _options(context, choices)
    from gemma_edge.report.console import progress_bar
    from gemma_edge.sweep import report
    from gemma_edge.sweep.estimate import estimate

    found = estimate(options, counts, progress_bar)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        report.print_estimate(found)


@main.command(cls=Command)
@click.argument("address")
@click.option("--phones", metavar="all|SERIAL,...", help="Offer these phones of this machine.")
@click.option("--cores", type=int, help="Cores to offer. Default: all of this machine's.")
@click.option("--ram", "ram_gib", type=float, help="GiB of memory to offer. Default: nine tenths of what is free.")
@click.option("--no-bench", is_flag=True, help="Let nothing be timed on this machine.")
@click.option("--no-gpu", is_flag=True, help="Do not offer this machine's GPU.")
@click.option("--name", help="What the node is called.")
def node(
    address: str,
    phones: str | None,
    cores: int | None,
    ram_gib: float | None,
    no_bench: bool,
    no_gpu: bool,
    name: str | None,
) -> None:
    """Be a node of the Dask scheduler at ADDRESS, until it ends."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _need_extra()
    from gemma_edge.sweep import shelf
    from gemma_edge.sweep.cluster import nodes
    from gemma_edge.sweep.units import CORES, RAM

    offers = nodes.own_resources(shelf.connected(phones) if phones else [], quiet=not no_bench, gpu=not no_gpu)
    chosen = {CORES: cores, RAM: None if ram_gib is None else ram_gib * 2**30}
    for field, value in chosen.items():
        if value is not None and value <= 0:
            raise InputError(f"`{field}` {value:g} is not above 0", field=field, value=value)
    nodes.join(address, {**offers, **{key: float(value) for key, value in chosen.items() if value is not None}}, name)


def _need_extra() -> None:
    for package in ("distributed", "optuna", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"gemma-sweep needs {package}, which is not installed: pip install 'gemma-edge[sweep]'")


def _options(context: click.Context, choices: dict[str, Any]) -> SweepOptions:
    space = _space(choices)
    text = CalibrationText(paths=choices["calibration_text"], chat=choices["calibration_chat"])
    base = ExportOptions(
        model=choices["model"],
        target=choices["target"],
        ram_gib=choices["ram_gib"],
        quantization=QuantizeOptions(calibration_text=text),
        verify=choices["verify"],
    )
    if base.target not in TARGETS:
        raise InputError(field="target", value=base.target, allowed=TARGETS)
    if base.verify not in LEVELS:
        raise InputError(field="verify", value=base.verify, allowed=LEVELS)
    timing = {"prefill", "decode", "repeat", "threads"} & set(given(context))
    if choices["no_bench"] and timing:
        name = sorted(timing)[0]
        raise InputError(f"`{name}` has no effect beside `no_bench`; leave one of them out", field=name)
    return SweepOptions(
        base,
        choices["out"],
        space,
        _limits(choices),
        choices["pick"],
        choices["budget"],
        Measuring(choices["texts"], choices["max_tokens"], _bench(choices), choices["phones"]),
        Where(choices["address"], choices["store"], choices["cores"], choices["retries"], choices["split"]),
        choices["verify"],
    )


def _space(choices: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    typed = {name: values(name, choices[name]) for name in AXES if choices[name] is not None}
    if choices["space"] is None:
        return typed
    read = read_space(choices["space"])
    if twice := sorted(typed.keys() & read.keys()):
        raise InputError(f"`{twice[0]}` is also in `space` {choices['space']}; give it once", field=twice[0])
    return {**read, **typed}


def _limits(choices: dict[str, Any]) -> Limits:
    for name in ("max_kl", "min_decode"):
        if choices[name] is not None and not choices[name] > 0:
            raise InputError(f"`{name}` {choices[name]:g} is not above 0", field=name, value=choices[name])
    return Limits(_bytes("max_size", choices), _bytes("max_ram", choices), choices["max_kl"], choices["min_decode"])


def _bytes(name: str, choices: dict[str, Any]) -> int | None:
    if choices[name] is None:
        return None
    from gemma_edge.quantize.mixed.choose import parse_size

    try:
        return parse_size(choices[name])
    except InputError:
        hint = f"give a number of bytes with a unit, {UNITS_OF_BYTES}"
        raise InputError(field=name, value=choices[name], hint=hint) from None


def _bench(choices: dict[str, Any]) -> Settings | None:
    if choices["no_bench"]:
        return None
    from gemma_edge.bench.bench import Sweep

    cores = os.cpu_count() or 1
    threads = choices["threads"] or min(TARGETS[choices["target"]].threads, cores)
    timed = Sweep([threads], [choices["prefill"]], choices["decode"], choices["repeat"], 1, 0.0)
    return timed.settings(cores)[0]
