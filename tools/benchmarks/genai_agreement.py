"""Compares `gemma-bench --peer genai` with onnxruntime-genai's own benchmark: both run on one bundle, in turns.

    python tools/benchmarks/genai_agreement.py BUNDLE [--rounds 6]

Its own benchmark is benchmark/python/benchmark_e2e.py. The package does not contain it, so the same loop is written here:
after warm-ups that generate as much, it times `append_tokens` of random tokens, then each `generate_next_token` after the
first one, and takes means. Each measurement is a process of its own. Needs `pip install onnxruntime-genai`.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

import click

from gemma_edge.bench.bench import Contender, measure
from gemma_edge.bench.peers import contenders
from gemma_edge.bench.result import Settings
from gemma_edge.command import one_line_errors

# Speeds: tokens per second of the prompt, and of what is generated after it.
Speeds = tuple[float, float]


def its_own(bundle: Path, settings: Settings) -> Speeds:
    """The loop of benchmark_e2e.py."""
    import onnxruntime_genai as og  # type: ignore[import-not-found, import-untyped, unused-ignore]

    config = og.Config(str(bundle))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": settings.threads}}}}))
    model = og.Model(config)
    length = settings.prefill + settings.decode
    prompts, tokens = list[float](), list[float]()
    for number in range(-settings.warmup, settings.repeat):
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        ids = [random.randrange(100) for _ in range(settings.prefill)]
        ticks = [time.perf_counter()]
        generator.append_tokens(ids)
        ticks.append(time.perf_counter())
        for _ in range(settings.decode):
            generator.generate_next_token()
            ticks.append(time.perf_counter())
        if number >= 0:
            prompts.append(ticks[1] - ticks[0])
            tokens += [after - before for before, after in zip(ticks[2:], ticks[3:], strict=False)]
    return settings.prefill / mean(prompts), 1 / mean(tokens)


def in_a_process(bundle: Path, settings: Settings) -> Speeds:
    """`its_own` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(its_own, bundle, settings).result()


def by_gemma_bench(peer: Contender, settings: Settings) -> Speeds:
    """The speeds that `gemma-bench --peer genai` prints."""
    result = measure(peer, settings)
    if result.failure:
        raise click.ClickException(result.failure)
    return settings.prefill / median(result.prefill_s), settings.decode / median(result.decode_s)


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-p", "prefill", default=128, show_default=True, help="Length of the prompt in tokens.")
@click.option("-n", "decode", default=64, show_default=True, help="Number of tokens generated after it.")
@click.option("-r", "repeat", default=3, show_default=True, help="Number of repetitions in one process.")
@click.option("-t", "threads", default=2, show_default=True, help="Number of threads.")
@click.option("--rounds", default=6, show_default=True, help="How often each of the two is measured.")
@one_line_errors()
def main(bundle: Path, prefill: int, decode: int, repeat: int, threads: int, rounds: int) -> None:
    """Measure both in turns, then print their medians and how far the rounds lie apart."""
    settings = Settings(threads, prefill, decode, repeat)
    (peer,) = contenders(["genai"], [bundle])
    speeds: dict[str, list[Speeds]] = {"its own": [], "gemma-bench": []}
    for _ in range(rounds):
        speeds["its own"].append(in_a_process(bundle, settings))
        speeds["gemma-bench"].append(by_gemma_bench(peer, settings))
        click.echo("  ".join(f"{name} {rows[-1][0]:.1f} {rows[-1][1]:.2f}" for name, rows in speeds.items()), err=True)
    for part, label in enumerate(("prompt", "after it")):
        for name, rows in speeds.items():
            ranked = sorted(row[part] for row in rows)
            click.echo(f"{label:9} {name:12} {median(ranked):7.2f} tokens/s ({ranked[0]:.2f} to {ranked[-1]:.2f})")
        ratios = [
            ours[part] / theirs[part] for theirs, ours in zip(speeds["its own"], speeds["gemma-bench"], strict=True)
        ]
        click.echo(
            f"{label:9} gemma-bench / its own, round by round: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
