"""Measures how long one calibration takes when 0, 1 and 3 idle nodes help, and that its files are the same bytes.

    python tools/benchmarks/synthetic.py OUT --shape gemma3-1b --layers 2
    python tools/benchmarks/sweeps/helping.py OUT [--nodes 1,2,4] [--quality balanced] [--repeat 3]

All nodes are processes of this machine with a core each: where it has fewer cores than nodes, more nodes bring nothing. The
numbers of nodes take turns, so that other load on the machine falls on all of them. Beside each time stands what
`gemma-sweep plan --split` says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from distributed import Client

from gemma_edge.model.checkpoint import Weights
from gemma_edge.quantize.api import open_source
from gemma_edge.quantize.calibration.estimate import estimate_s
from gemma_edge.quantize.calibration.layerwise import Calibration, calibrate
from gemma_edge.quantize.recipe import QUALITIES, Recipe, make_recipe
from gemma_edge.sweep.cluster.helpers import helpers
from gemma_edge.sweep.units import CORES, RAM

NODE = "from gemma_edge.sweep.cli import main; main()"
NEEDS = {CORES: 1.0, RAM: 1e9}


@contextmanager
def cluster(folder: Path, count: int) -> Iterator[str]:
    """A scheduler and so many nodes; its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        with (folder / f"log-{len(started)}").open("wb") as log:
            started.append(subprocess.Popen([sys.executable, *words], stdout=log, stderr=log))

    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    try:
        start("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
              "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))  # fmt: skip
        while not file.exists():
            time.sleep(0.1)
        address: str = json.loads(file.read_text())["address"]
        for number in range(count):
            start("-c", NODE, "node", address, "--cores", "1", "--ram", "64", "--no-bench", "--name", f"n{number}")
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(count)
        yield address
    finally:
        for process in started:
            process.kill()
            process.wait()


def measured(source: Weights, recipe: Recipe, seen: Calibration, nodes: int) -> tuple[float, str]:
    """Seconds of a pass, and a hash of its layers."""
    with tempfile.TemporaryDirectory() as name, cluster(Path(name), nodes) as address:
        folder = Path(name) / "layers"
        folder.mkdir()
        with Client(address, set_as_default=False) as client:
            own = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
        with helpers(address, own, "measured", NEEDS) as each:
            each(len, ["warm"] * 4 * nodes)  # the process that others are forked from loads torch
            began = time.monotonic()
            calibrate(source, recipe, seen, folder, each=each)
            seconds = time.monotonic() - began
        found = b"".join(path.read_bytes() for path in sorted(folder.glob("layer-*")))
    return seconds, hashlib.sha256(found).hexdigest()


def main() -> None:
    """Print the medians for each number of nodes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--nodes", default="1,2,4")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="Calibration tokens. Default: those of the quality.")
    words = parser.parse_args()
    torch.set_num_threads(1)
    source, quality = open_source(str(words.model), None), QUALITIES[words.quality]
    tokens = words.tokens or quality.tokens
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, source.config.vocab_size, (tokens // 512, 512), generator=generator)
    seen = Calibration(windows, quality.rounds, quality.refit)
    recipe = make_recipe(4, quality=words.quality)
    counts = [int(word) for word in words.nodes.split(",")]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    hashes = set()
    for _ in range(words.repeat):
        for count in counts:
            took, found = measured(source, recipe, seen, count)
            seconds[count].append(took)
            hashes.add(found)
            load = os.getloadavg()[0]
            print(f"{count} nodes: {took:.1f} s, load of the machine {load:.1f}", flush=True)
    print(f"{source.config.num_hidden_layers} layers, {tokens} tokens, {os.cpu_count()} cores, {words.quality}")
    first = median(seconds[counts[0]])
    for count in counts:
        runs, planned = seconds[count], estimate_s(source.config, recipe, seen, count)
        print(f"{count} nodes: median {median(runs):.1f} s ({min(runs):.1f} to {max(runs):.1f}),"
              f" {first / median(runs):.2f} times as fast; planned {planned:.1f} s,"
              f" {estimate_s(source.config, recipe, seen, counts[0]) / planned:.2f} times")  # fmt: skip
    print("the same bytes" if len(hashes) == 1 else f"DIFFERENT BYTES: {sorted(hashes)}")


if __name__ == "__main__":
    main()
