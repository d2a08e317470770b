"""Whether `gemma-bench --peer genai` finds what onnxruntime-genai's own benchmark finds: both on one bundle, in turns.

    python tools/benchmarks/genai_agreement.py BUNDLE [--rounds 6]

Its own is benchmark/python/benchmark_e2e.py of onnxruntime-genai, which is not in the package: the same loop is written down
here. After warm-ups that generate as much, it times `append_tokens` of random tokens, then each `generate_next_token` after the
first, and takes means. Each measurement is a process of its own. Needs `pip install onnxruntime-genai`.
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

Speeds = tuple[float, float]  # tokens per second of the prompt, and after it


def its_own(bundle: Path, asked: Settings) -> Speeds:
    """The loop of benchmark_e2e.py."""
    import onnxruntime_genai as og  # type: ignore[import-not-found, import-untyped, unused-ignore]

    config = og.Config(str(bundle))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": asked.threads}}}}))
    model = og.Model(config)
    length = asked.prefill + asked.decode
    prompts, tokens = list[float](), list[float]()
    for number in range(-asked.warmup, asked.repeat):
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        ids = [random.randrange(100) for _ in range(asked.prefill)]
        ticks = [time.perf_counter()]
        generator.append_tokens(ids)
        ticks.append(time.perf_counter())
        for _ in range(asked.decode):
            generator.generate_next_token()
            ticks.append(time.perf_counter())
        if number >= 0:
            prompts.append(ticks[1] - ticks[0])
            tokens += [after - before for before, after in zip(ticks[2:], ticks[3:], strict=False)]
    return asked.prefill / mean(prompts), 1 / mean(tokens)


def in_a_process(bundle: Path, asked: Settings) -> Speeds:
    """The same, in a process that ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(its_own, bundle, asked).result()


def by_gemma_bench(peer: Contender, asked: Settings) -> Speeds:
    """What `gemma-bench --peer genai` would print."""
    found = measure(peer, asked)
    if found.failure:
        raise click.ClickException(found.failure)
    return asked.prefill / median(found.prefill_s), asked.decode / median(found.decode_s)


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-p", "prefill", default=128, show_default=True)
@click.option("-n", "decode", default=64, show_default=True)
@click.option("-r", "repeat", default=3, show_default=True)
@click.option("-t", "threads", default=2, show_default=True)
@click.option("--rounds", default=6, show_default=True)
@one_line_errors()
def main(bundle: Path, prefill: int, decode: int, repeat: int, threads: int, rounds: int) -> None:
    """Both in turns, then their medians and how far rounds lie apart."""
    asked = Settings(threads, prefill, decode, repeat)
    (peer,) = contenders(["genai"], [bundle])
    found: dict[str, list[Speeds]] = {"its own": [], "gemma-bench": []}
    for _ in range(rounds):
        found["its own"].append(in_a_process(bundle, asked))
        found["gemma-bench"].append(by_gemma_bench(peer, asked))
        click.echo("  ".join(f"{name} {rows[-1][0]:.1f} {rows[-1][1]:.2f}" for name, rows in found.items()), err=True)
    for part, label in enumerate(("prompt", "after it")):
        for name, rows in found.items():
            speeds = sorted(row[part] for row in rows)
            click.echo(f"{label:9} {name:12} {median(speeds):7.2f} tokens/s ({speeds[0]:.2f} to {speeds[-1]:.2f})")
        ratios = [
            ours[part] / theirs[part] for theirs, ours in zip(found["its own"], found["gemma-bench"], strict=True)
        ]
        click.echo(
            f"{label:9} gemma-bench / its own, round by round: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
