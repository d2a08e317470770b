"""Shared by all tests: one tiny configuration, checkpoints of it made by transformers and not by us, and the demo's bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import DEMO, ROOT, SHAPES, make_checkpoint
from support.toy_backend import INFO

import gemma_edge
from gemma_edge.bundle import backends
from gemma_edge.bundle.backends import BackendInfo, register, registered
from gemma_edge.export import api as pipeline
from gemma_edge.export.api import Export
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.calibration.cache import VARIABLE
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.runtimes.engines.base import Runtime

# The models here are so small that two threads wait for each other longer than they compute: 85 s instead of 3 on a busy machine.
torch.set_num_threads(1)

# The files that take longest, in that order and before all others: so no worker of `make test` is left alone with one of them.
LONGEST = (
    "quantize/calibration/test_block.py",
    "export/executorch/test_executorch_lowering.py",
    "test_docs.py",
    "export/onnx/test_onnx_parity.py",
    "export/executorch/test_executorch.py",
    "cli/test_export_cli.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; else the order stays."""
    order = {ROOT / "tests" / name: index for index, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in order)
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this run's calibrations are kept, those of commands included: never the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("tiny")`: the folder of a named shape, made once a session."""
    made: dict[str, Path] = {}

    def make(shape: str = "tiny") -> Path:
        if shape not in made:
            made[shape] = make_checkpoint(tmp_path_factory.mktemp(shape), **SHAPES[shape])
        return made[shape]

    return make


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, calibrations: Path) -> Export:
    """The demo model's bundle by the real pipeline, once a session; its integers lie beside it in `checkpoint`."""
    folder = tmp_path_factory.mktemp("demo")
    options = ExportOptions(model=str(DEMO), out=folder / "bundle", save_checkpoint=folder / "checkpoint")
    return pipeline.export(options)


# TALKERS: the backends of `talking`. The web backend takes no groups, and its file runs in the engine of tflite.
TALKERS = tuple(name for name in registered() if name != "web")


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The demo model, which makes sense now and then, with every backend that is installed; its context is soon full."""
    options = ExportOptions(
        model=str(DEMO),
        out=tmp_path_factory.mktemp("talking") / "bundle",
        quantization=QuantizeOptions(bits=4, group_size=32, method="rtn"),
        context=48,
        prefill_chunk=7,
        kv_bits=32,
        backend=",".join(name for name in TALKERS if registered()[name].how_to_install() is None),
        verify="none",
    )
    return pipeline.export(options)


@pytest.fixture(params=TALKERS)
def talker(request: pytest.FixtureRequest, talking: Export) -> Runtime:
    """`talking` in each backend."""
    if command := registered()[request.param].how_to_install():
        pytest.skip(f"{request.param} is not installed: {command}")
    return gemma_edge.load(talking.bundle, backend=request.param, threads=1)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendInfo]:
    """Registered in this process only; the gate's process finds the engine's module by PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    register(INFO)
    yield INFO
    del backends._registered[INFO.name]
