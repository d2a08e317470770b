"""Measures a bundle's ExecuTorch program in a process without Python and torch, as in an app: memory, load time, speed.

    python tools/benchmarks/executorch_native.py BUNDLE [--prompt 128] [--decode 32] [--packed FILE]

Needs g++; builds executorch_native.cpp against the headers and libraries of the installed executorch package. `--packed` keeps
the weights as XNNPACK packs them in FILE: the first start writes it, the next ones map it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = ("", "_backend_xnnpack", "_kernels_optimized", "_kernels_quantized", "_threadpool", "_etdump")


def build(folder: Path) -> Path:
    """Compile the program into a folder, and return its path."""
    (root,) = (Path(path) for path in importlib.import_module("executorch").__path__)
    include = root / "include"
    program = folder / "executorch_native"
    subprocess.run(
        [
            "g++", "-std=c++20", "-O2", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS",
            f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10",
            SOURCE, "-o", program,
            f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'},--no-as-needed", *(f"-lexecutorch{name}" for name in LIBRARIES),
        ],
        check=True,
    )  # fmt: skip
    return program


def run(program: Path, bundle: Path, ids: list[int], decode: int, packed: Path | None) -> dict[str, Any]:
    """Run the program on a prompt and `decode` greedy tokens after it, and return the figures that it prints."""
    backends = Manifest.load(bundle).backends
    if "executorch" not in backends:
        raise InputError(f"{bundle} holds {', '.join(backends)}, not executorch; export it with --backend executorch")
    entry = backends["executorch"]
    words = [
        bundle / entry.settings.program,
        entry.cache.prefill_chunk,
        decode,
        packed or "-",
        ",".join(map(str, ids)),
    ]
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program.name} failed: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=128, help="length of the prompt in tokens")
    parser.add_argument("--decode", type=int, default=32, help="number of tokens generated after it")
    parser.add_argument("--packed", type=Path)
    options = parser.parse_args()
    if shutil.which("g++") is None:
        sys.exit("no g++ on the PATH: install it")
    ids = [2, *(10 + index % 1000 for index in range(options.prompt - 1))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            figures = run(build(Path(folder)), options.bundle, ids, options.decode, options.packed)
        except InputError as error:
            sys.exit(f"error: {error}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
