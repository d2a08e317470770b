"""`gemma-eval`: parses, calls evaluate.py, prints with eval_report.py. Heavy imports are inside, for a quick --help."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_edge.command import Command
from gemma_edge.errors import InputError
from gemma_edge.files import check_writable, need, write_whole

if TYPE_CHECKING:
    from gemma_edge.evaluate.evaluate import Evaluation
    from gemma_edge.evaluate.lm_eval_adapter import Tasks

PATH = click.Path(path_type=Path)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, type=PATH, metavar="BUNDLE|FOLDER...")
@click.option("--reference", type=PATH, help="The original's folder: adds KL, top-1 agreement and perplexity change.")
@click.option("--text", "texts", multiple=True, type=PATH, help="UTF-8 text; repeatable. Default: held-out texts.")
@click.option("--protocol", default="hf", show_default=True, help="How the text is cut and scored: hf or llama.cpp.")
@click.option("--window", type=int, help="Tokens of a window, BOS included. Default: 512, or the smallest context.")
@click.option("--max-tokens", type=int, default=4096, show_default=True, help="Of all texts together; 0 = all.")
@click.option("--backend", help="Which backend of the bundles. Default: the first that is installed.")
@click.option("--threads", type=int, help="For bundles. Default: the bundle's target's, at most what this machine has.")
@click.option("--tasks", help="lm-eval tasks, comma-separated: names, or YAML files of your own.")
@click.option("--include-path", type=PATH, help="Folder with further lm-eval task files.")
@click.option("--limit", type=int, help="Most examples of each task.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables.")
@click.option("--html", type=PATH, help="Also write a report with plots to this file.")
@click.version_option(package_name="gemma-edge")
def main(
    tasks: str | None, include_path: Path | None, limit: int | None, as_json: bool, html: Path | None, **choices: Any
) -> None:
    """Measure bundles and Hugging Face folders, side by side on the same tokens.

    Perplexity on a text; with --reference also how far each is from the original; with --tasks lm-eval's scores.
    A folder may be float or quantized in gemma-export's layout; it is computed with PyTorch.
    """
    # before torch is loaded: a thread that waits must not spin, which costs most of the time beside other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if tasks is not None:
        need("--tasks", "lm_eval")
    if html is not None:
        need("--html", "matplotlib")
        check_writable("--html", html)
    from gemma_edge.evaluate import evaluate
    from gemma_edge.report.console import progress_bar

    job = evaluate.prepare(evaluate.Options(**choices))
    loaded = _load_tasks(tasks, include_path, limit)
    done = evaluate.evaluate(job, progress_bar)
    if loaded is not None:
        for result, model in zip(done.results, job.models, strict=True):
            result.tasks = loaded.run(model.runtime(), job.tokenizer, progress_bar, limit=limit)
    _show(done, as_json, html)


def _load_tasks(tasks: str | None, include_path: Path | None, limit: int | None) -> Tasks | None:
    """Before any work: a task that cannot be loaded must not be found out after an hour."""
    if tasks is None:
        return None
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task; give names or YAML files, comma-separated")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} is below 1")
    from gemma_edge.evaluate.lm_eval_adapter import Tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings tell of its own defaults
    return Tasks(names, include_path)


def _show(done: Evaluation, as_json: bool, html: Path | None) -> None:
    from gemma_edge.evaluate import report as eval_report

    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    if html is not None:
        from gemma_edge.evaluate import html as eval_html

        write_whole(html, eval_html.page(done))
    if as_json:
        click.echo(json.dumps(asdict(done), indent=1, ensure_ascii=False))
    else:
        eval_report.print_tables(done)
