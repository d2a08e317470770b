"""`gemma-export` for tests: called as a function, or as a process; and what a refusal must look like."""

from __future__ import annotations

import sys
from pathlib import Path

from click.testing import CliRunner, Result

from gemma_edge.export.cli import main

COMMAND = [sys.executable, "-c", "from gemma_edge.export.cli import main; main()"]


def run(*args: str | Path) -> Result:
    """`gemma-export ARGS`, in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(result: Result, *parts: str) -> None:
    """One line on stderr with these parts, warnings and progress at most before it; exit 2, no traceback."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.strip().endswith(line) and "Traceback" not in result.output
    for part in parts:
        assert part in line, line
