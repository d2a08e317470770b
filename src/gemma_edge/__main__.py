"""`gemma-edge` and `python -m gemma_edge`: one command in front of the five. Each is imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

# name -> what it does, and where it is
COMMANDS = {
    "export": ("Export a model to a verified bundle (gemma-export).", "gemma_edge.export.cli"),
    "run": ("Run a bundle: continue a text, chat, or serve (gemma-run).", "gemma_edge.runtimes.cli"),
    "eval": ("Measure the quality of bundles and folders (gemma-eval).", "gemma_edge.evaluate.cli"),
    "bench": ("Measure the speed and memory of bundles (gemma-bench).", "gemma_edge.bench.cli"),
    "sweep": ("Find the best bundle under constraints (gemma-sweep).", "gemma_edge.sweep.cli"),
}


class _Lazy(click.Group):
    """Lists the commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command itself."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][1]).main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Their lines of help, from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (text, _) in COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma-edge")
def main(**_: Any) -> None:
    """Export Gemma to phones, prove the result equal, and run it."""


if __name__ == "__main__":
    main(prog_name="gemma-edge")
