"""`gemma-eval`: parses the options, calls `evaluate`, and shows the result. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.command import Command, given, note
from gemma_edge.errors import InputError
from gemma_edge.files import check_writable, need, write_whole

if TYPE_CHECKING:
    from gemma_edge.evaluate.result import Evaluation

PATH = click.Path(path_type=Path)
# NEEDED: options that have no effect unless another one is given.
NEEDED = {"include_path": "tasks", "limit": "tasks"}


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, type=PATH, metavar="BUNDLE|FOLDER|GGUF...")
@click.option(
    "--reference",
    type=PATH,
    help="Folder or GGUF file of the original model. Adds KL, top-1 agreement and perplexity change.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=PATH,
    help="UTF-8 file to measure on; repeatable. Default: the held-out texts.",
)
@click.option("--protocol", default="hf", show_default=True, help="How the text is cut and scored: hf or llama.cpp.")
@click.option("--window", type=int, help="Tokens in each window, with BOS. Default: 512, or a smaller context.")
@click.option(
    "--max-tokens", type=int, default=4096, show_default=True, help="Tokens taken of all texts together; 0 takes all."
)
@click.option("--backend", help="Backend that runs the bundles. Default: the first of each bundle that is installed.")
@click.option(
    "--threads",
    type=int,
    help="Threads for each bundle. Default: what its target sets; never more than the number of cores.",
)
@click.option("--tasks", help="Tasks of lm-eval to score, comma-separated: names, or YAML files of your own.")
@click.option("--include-path", type=PATH, help="Folder with further task files, which --tasks can then name.")
@click.option("--limit", type=int, help="Number of examples taken of each task. Default: all.")
@click.option(
    "--memorization",
    type=PATH,
    metavar="FILE",
    help="Count how many passages of this UTF-8 file each model knows by heart: 50 tokens are given, 50 must follow.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of tables.")
@click.option("--html", type=PATH, help="Write a report with plots to this file, too.")
@click.version_option(package_name="gemma-edge")
@click.pass_context
def main(
    context: click.Context,
    /,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    as_json: bool,
    html: Path | None,
    **choices: Any,
) -> None:
    """Measure bundles, Hugging Face folders and GGUF files, side by side on the same tokens.

    Reports the perplexity on a text; with --reference also how far each model is from the original; with --tasks the scores of
    lm-eval's tasks. A folder holds float weights, or integers that gemma-export wrote; PyTorch runs it. The weights of a GGUF
    file are dequantized.
    """
    refuse_unused(context)
    # Before torch is loaded: a thread that waits must not spin, which would cost most of the time beside other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if html is not None:
        need("--html", "matplotlib")
        check_writable("--html", html)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its own defaults
    from gemma_edge.evaluate.evaluate import evaluate
    from gemma_edge.evaluate.options import EvaluationOptions, TaskOptions
    from gemma_edge.report.console import progress_bar

    names = None if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    task_options = None if names is None else TaskOptions(names, include_path, limit)
    _show(evaluate(EvaluationOptions(**choices, tasks=task_options), progress_bar), as_json, html)


def refuse_unused(context: click.Context) -> None:
    """Refuse an option that has no effect because the option it belongs to is missing.

    Raises:
        InputError: with both options.
    """
    typed = given(context)
    for name, other in NEEDED.items():
        if name in typed and context.params[other] is None:
            raise InputError(f"`{name}` has no effect without `{other}`; leave it out", field=name)


def _show(evaluation: Evaluation, as_json: bool, html: Path | None) -> None:
    from gemma_edge.evaluate import report

    for text in evaluation.notes:
        note(text)
    if html is not None:
        from gemma_edge.evaluate.html import page

        write_whole(html, page(evaluation))
    if as_json:
        click.echo(json.dumps(asdict(evaluation), indent=1, ensure_ascii=False))
    else:
        report.print_tables(evaluation)
