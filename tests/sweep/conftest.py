"""A small sweep of the demo, once a session."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.sweeps import SMALL, run


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
