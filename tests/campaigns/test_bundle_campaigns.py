"""A short run of the campaigns about bundles, states and exports, with the seed of the day."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.checkpoints import ROOT

from campaigns import bundles, states
from campaigns.campaign import Campaign, seed_of_today
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.export.api import Export


def test_damaged_bundles(talking: Export, monkeypatch: pytest.MonkeyPatch, calibrations: object) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", os.environ["GEMMA_EDGE_CACHE"])  # the campaign sets another one
    here = Manifest.load(talking.bundle).backends
    monkeypatch.setattr(bundles, "BACKENDS", tuple(name for name in bundles.BACKENDS if name in here))
    campaign = Campaign("bundles", seed_of_today())
    bundles.run(campaign, 30, talking.bundle)
    assert campaign.exit_code == 0, campaign.summary()


def test_damaged_states() -> None:
    campaign = Campaign("states", seed_of_today())
    states.run(campaign, 20)
    assert campaign.exit_code == 0, campaign.summary()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="exports are forked, so that each begins with everything imported")
@pytest.mark.parametrize(("name", "tries"), [("kill", 6), ("disk", 4), ("memory", 4)])
def test_ended_exports_and_full_disks(name: str, tries: int) -> None:
    """In a process of its own: this one has threads, which a fork would not take along."""
    command = [sys.executable, "-m", f"campaigns.{name}", "--tries", str(tries)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    )
    assert done.returncode == 0, done.stdout
