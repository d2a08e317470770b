"""For the tests of exporting: a backend that gemma-edge does not know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.checkpoints import ROOT
from support.toy_backend import INFO

from gemma_edge.bundle import backends
from gemma_edge.bundle.backends import BackendInfo, register


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendInfo]:
    """Registered in this process only; the gate's process finds the engine's module by PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    register(INFO)
    yield INFO
    del backends._registered[INFO.name]
