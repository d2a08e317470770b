"""A small sweep of the demo, once a session."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.sweeping.command import SMALL, run

from gemma_edge.sweep.cluster.quiet import VARIABLE


@pytest.fixture(scope="session", autouse=True)
def own_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Benchmarks of tests do not wait for other sweeps on this machine, nor these for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("quiet")))
        yield


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One point, measured, picked and published: the sweep's folder, and what it printed."""
    for package in ("distributed", "optuna", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'gemma-edge[sweep]'")
    out = tmp_path_factory.mktemp("sweep") / "out"
    done = run(DEMO, "-o", out, "--bits", "4", "--group-size", "32", *SMALL, "--pick", "kl", "--json")
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)
