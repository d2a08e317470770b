"""Idle nodes help with a calibration: the same integers, however many there are, and also when they are lost or busy."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="distributed is not installed: pip install 'gemma-edge[sweep]'")

import torch
from support.checkpoints import make_checkpoint
from support.sweeping.cluster import PATIENCE_S, cluster, wait_until

from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.quantize.calibration.layerwise import Calibration, calibrate
from gemma_edge.quantize.calibration.windows import SHARD, Each, in_turn
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.sweep.cluster import helpers as module
from gemma_edge.sweep.cluster.helpers import Helpers, helpers
from gemma_edge.sweep.units import CORES, RAM

NEEDS = {CORES: 1.0, RAM: 1e9}
OFFERS = {CORES: 1.0, RAM: 1e12}
BEST = make_recipe(4, quality="best")
LOADED = ("gemma_edge.quantize.calibration.layerwise",)
Started = tuple[str, list[subprocess.Popen[bytes]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a helper's job has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    names = ("own", "second", "third")
    with cluster(tmp_path_factory.mktemp("nodes"), dict.fromkeys(names, OFFERS), LOADED) as started:
        yield started


def own_address(scheduler: str) -> str:
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        return next(str(address) for address, known in workers.items() if known["name"] == "own")


def calibrated(source: Checkpoint, each: Each, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    windows = torch.randint(3, 320, (2 * SHARD + 1, 24), generator=torch.Generator().manual_seed(0))
    calibrate(source, BEST, Calibration(windows, rounds=1, refit=True), folder, each=each)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_helpers_give_the_same_integers_and_the_loss_of_one_changes_nothing(
    three_nodes: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, (_, second, _) = three_nodes
    source = Checkpoint.open(make_checkpoint(tmp_path / "model", initializer_range=0.1))
    expected = calibrated(source, in_turn, tmp_path / "serial")
    answers: list[int] = []
    real = Helpers._asked

    def asked(self: Helpers, call: module._Call, number: int, *more: object) -> bytes | None:
        answer = real(self, call, number, *more)  # type: ignore[arg-type]
        answers.append(number)
        if len(answers) == 12:
            second.kill()
        return answer

    monkeypatch.setattr(Helpers, "_asked", asked)
    with helpers(scheduler, own_address(scheduler), "sweep", NEEDS) as each:
        assert calibrated(source, each, tmp_path / "helped") == expected
        assert len(answers) > 12 and len(each._places()) == 1  # the third node is left


def slow(job: int) -> tuple[int, int]:
    time.sleep(0.3)
    return job, os.getpid()


def killed(job: int) -> int:
    if os.getpid() != job:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_a_helper_that_is_busy_or_whose_process_dies_is_not_waited_for(tmp_path: Path) -> None:
    with cluster(tmp_path, {"own": OFFERS, "second": OFFERS}) as (scheduler, _):
        from distributed import Client

        own = own_address(scheduler)
        with helpers(scheduler, own, "sweep", NEEDS) as each, Client(scheduler, set_as_default=False) as client:
            found = each(slow, range(8))
            assert [job for job, _ in found] == list(range(8)) and len({pid for _, pid in found}) > 1
            assert each(killed, [os.getpid()] * 3) == [os.getpid()] * 3
            (other,) = {*client.scheduler_info(n_workers=-1)["workers"]} - {own}
            busy = client.submit(time.sleep, PATIENCE_S, workers=[other], resources=NEEDS)
            wait_until(lambda: bool(client.processing()[other]))
            time.sleep(0.5)  # until it runs
            found = each(slow, range(3))
            assert [job for job, _ in found] == [0, 1, 2] and {pid for _, pid in found} == {os.getpid()}
            assert not busy.done()


def test_what_a_job_refuses_is_raised_here(tmp_path: Path) -> None:
    with cluster(tmp_path, {"own": OFFERS, "second": OFFERS}) as (scheduler, _):
        with helpers(scheduler, own_address(scheduler), "sweep", NEEDS) as each:
            with pytest.raises(ZeroDivisionError):
                each((1).__truediv__, [1, 0, 2, 0])
    assert threading.active_count() < 30
