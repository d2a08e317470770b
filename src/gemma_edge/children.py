"""How a child process is started so that nothing in the current folder becomes code: it may be a stranger's model folder.

Every child runs in an empty folder of its own, because libraries read from the current folder too (matplotlib its
`matplotlibrc`, llama.cpp its `libggml-*.so`). The paths that a child is given must therefore be absolute. LD_LIBRARY_PATH and
its like are passed on as they are: the user set them for this process as well.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Variables that hold one path; relative ones would mean another folder in the child.
PLACES = ("GEMMA_EDGE_CACHE", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Place:
    """Where a child runs, and with which environment: keyword arguments of `subprocess.Popen`."""

    cwd: str
    env: Mapping[str, str]


@contextmanager
def own_place() -> Iterator[Place]:
    """An empty folder for a child to run in, removed at the end, and an environment that means the same from there."""
    with TemporaryDirectory(prefix="gemma-edge-", ignore_cleanup_errors=True) as folder:
        yield Place(folder, child_environment(os.environ))


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose Pythons, also those that a child starts, do not look for modules in the current folder."""
    result = {**environment, "PYTHONSAFEPATH": "1"}
    for name in PLACES:
        if result.get(name):
            result[name] = os.path.abspath(result[name])
    # An empty entry means the current folder: the usual slip of PYTHONPATH=$PYTHONPATH:/folder where it was not set before.
    entries = [os.path.abspath(entry) for entry in result.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**result, "PYTHONPATH": os.pathsep.join(entries)} if entries else result


def python_command(python: str | Path, words: Sequence[str]) -> list[str]:
    """The command that runs a Python without the current folder on `sys.path`.

    Args:
        python: a path, which may be relative to this process's folder, or a name to look up on the PATH.
        words: `-m MODULE`, `-c CODE` and what follows.
    """
    given = str(python)
    if os.path.dirname(given):
        program = os.path.abspath(given)  # a virtual environment's python is a link that must not be resolved
    else:
        program = find_program(given) or given
    return [program, "-P", *words]


def find_program(name: str, folders: Sequence[str | Path] | None = None) -> str | None:
    """The absolute path of a program in the first folder that has it; relative and empty folders are passed over.

    Args:
        name: without folder.
        folders: None: those of the PATH. `shutil.which` would also look in the current folder, where the PATH has an empty
            entry and on Windows always.
    """
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folders is None else folders:
        if os.path.isabs(folder) and (result := shutil.which(os.path.join(folder, name))):
            return result
    return None
