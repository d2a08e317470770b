"""A bundle's logits on an accelerator, in a process of its own: a driver that ends its process must not end the tests.

`python -m support.on_accelerator BUNDLE ACCELERATOR IDS CHUNKS OUT` feeds the ids in chunks of these sizes, and saves the logits
after each chunk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gemma_edge
from gemma_edge.runtimes.engines import software_gpu
from gemma_edge.runtimes.engines.qualcomm import npu
from support.checkpoints import ROOT


def logits_on(bundle: Path, accelerator: str, ids: list[int], chunks: list[int], out: Path) -> NDArray[np.float32]:
    """The logits (C, V) after each chunk. The accelerator gpu is SwiftShader, the NPU is emulated."""
    command = [sys.executable, "-m", "support.on_accelerator", str(bundle), accelerator]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")]),
        software_gpu.VARIABLE: str(software_gpu.swiftshader()),
    }
    done = subprocess.run(
        [*command, json.dumps(ids), json.dumps(chunks), str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    computed: NDArray[np.float32] = np.load(out)
    return computed


def main() -> None:
    """Entry point of the process."""
    bundle, accelerator, ids, chunks, out = sys.argv[1:]
    runtime = gemma_edge.load(bundle, accelerator=accelerator, threads=1)
    expected = {"gpu": software_gpu.NAME, "npu:qualcomm": npu.SIMULATOR}.get(accelerator, accelerator)
    assert runtime.computes_on == expected, runtime.computes_on
    rows, waiting = [], json.loads(ids)
    for size in json.loads(chunks):
        rows.append(runtime.prefill(waiting[:size]))
        waiting = waiting[size:]
    np.save(out, np.stack(rows))


if __name__ == "__main__":
    main()
