"""A calibration whose jobs run in other processes, in any order, gives the bytes of one that does them in turn."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import make_checkpoint
from torch import Tensor

from gemma_edge.model.checkpoint import Checkpoint
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.calibration.block import gemma_topology, second_moments
from gemma_edge.quantize.calibration.estimate import estimate_s
from gemma_edge.quantize.calibration.layerwise import Calibration, calibrate
from gemma_edge.quantize.calibration.windows import SHARD, Each, in_turn, runner
from gemma_edge.quantize.recipe import make_recipe

RECIPES = {"gptq": (make_recipe(4, quality="balanced"), False), "awq+gptq": (make_recipe(4, quality="best"), True)}


def text(windows: int = 2 * SHARD + 1) -> Tensor:
    return torch.randint(3, 320, (windows, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("windows"), initializer_range=0.1))


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    context = multiprocessing.get_context("forkserver")
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(threads,)) as started:
        yield started


class Scattered:
    """Jobs in other processes, begun in random order."""

    def __init__(self, pool: Executor) -> None:
        self._pool, self.counts = pool, list[int]()

    def __call__(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
        todo = list(enumerate(jobs))
        self.counts.append(len(todo))
        random.Random(len(self.counts)).shuffle(todo)
        futures = {number: self._pool.submit(function, job) for number, job in todo}
        return [futures[number].result() for number in sorted(futures)]


@pytest.mark.parametrize("method", RECIPES)
def test_jobs_in_other_processes_give_the_same_bytes(
    method: str, source: Checkpoint, pool: Executor, tmp_path: Path
) -> None:
    recipe, refit = RECIPES[method]
    seen = Calibration(text(), rounds=1, refit=refit)
    found = []
    scattered = Scattered(pool)
    ways: dict[str, Each] = {"serial": in_turn, "scattered": scattered}
    for name, each in ways.items():
        (tmp_path / name).mkdir()
        reports, scales = calibrate(source, recipe, seen, tmp_path / name, each=each)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        found.append((reports, {layer: [x.tolist() for x in pair] for layer, pair in scales.items()}, files))
    assert found[0] == found[1]
    shards, sites, linears = 3, 4, 7
    folds = [8] * 4 if recipe.folds else []  # candidates of each
    layer = [shards, shards, *folds, sites, linears, shards]
    assert scattered.counts == layer * source.config.num_hidden_layers


def test_codes_depend_on_every_window(source: Checkpoint, tmp_path: Path) -> None:
    """Each shard counts, the last one, which is smaller, too."""
    recipe, _ = RECIPES["gptq"]
    codes = []
    for windows in (2 * SHARD, 2 * SHARD + 1):
        folder = tmp_path / str(windows)
        folder.mkdir()
        calibrate(source, recipe, Calibration(text()[:windows]), folder)
        codes.append(load_file(folder / "layer-001.safetensors"))
    assert any(not torch.equal(value, codes[1][name]) for name, value in codes[0].items())


def test_second_moments_do_not_depend_on_the_shards_but_for_rounding(source: Checkpoint) -> None:
    x = torch.randn(2 * SHARD + 1, 24, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    block, run, topology = source.load_layer(0), runner(source, 0, 24), gemma_topology(source.config)
    whole = second_moments(block, x, run, topology)
    pairs = [x[start : start + 2] for start in range(0, len(x), 2)]
    weights = [len(pair) / len(x) for pair in pairs]
    parts = [second_moments(block, pair, run, topology) for pair in pairs]
    for name, moment in whole.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(moment.double(), expected, rtol=1e-4, atol=1e-5)


def test_more_nodes_take_less_time_until_the_largest_job_is_the_time(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_edge.quantize.calibration.estimate._seconds_per_flop", lambda: 1e-9)
    config: GemmaConfig = source.config
    for recipe, refit in RECIPES.values():
        seen = Calibration(torch.zeros(32, 512), rounds=2, refit=refit)
        seconds = [estimate_s(config, recipe, seen, nodes) for nodes in (1, 2, 4, 64, 128)]
        assert seconds[0] > seconds[1] > seconds[2] > seconds[3] == seconds[4]
        assert seconds[1] >= seconds[0] / 2 and seconds[2] >= seconds[0] / 4
