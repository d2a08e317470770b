"""`gemma-sweep` for tests, and a small sweep."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from gemma_edge.sweep.cli import main

# SMALL: options under which a point of the demo takes seconds
SMALL = ("--method", "rtn", "--backend", "onnx", "--context", "256", "--max-tokens", "128", "--no-bench")


def run(*args: str | Path) -> Result:
    """`gemma-sweep ARGS`, in this process and those that it starts."""
    return CliRunner().invoke(main, [str(arg) for arg in args])
