"""A backend is one folder, one engine and one entry: another package adds one, and this repository's code stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import ROOT, hf_logits, hf_model
from support.lowered import some_ids
from support.toy_backend import INFO

import gemma_edge
from gemma_edge.bench.bench import backend_files
from gemma_edge.bundle import backends
from gemma_edge.bundle.backends import BackendInfo, register, registered
from gemma_edge.bundle.codec import convert
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.options import QuantizeOptions

TESTS = ROOT / "tests"


def test_a_registered_backend_is_exported_gated_in_its_own_process_and_run(
    toy: BackendInfo, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options = ExportOptions(
        str(checkpoint()),
        out=tmp_path / "bundle",
        quantization=QuantizeOptions(bits=32),
        context=16,
        prefill_chunk=7,
        backend=toy.name,
    )
    done = pipeline.export(options)
    result = done.manifest.verification["toy"]
    assert result.passed and result.past_wrap and result.quality.kl < 1e-6
    assert done.manifest.files["toy.npz"].bytes > done.manifest.backends["toy"].plan.weights_bytes > 0
    assert [path.name for path in backend_files(done.bundle, done.manifest, "toy")] == [
        "toy.npz"
    ]  # what gemma-bench weighs
    runtime = gemma_edge.load(done.bundle)
    ids = some_ids(16, runtime.vocab_size)
    expected = hf_logits(hf_model(checkpoint()), torch.tensor(ids))
    assert np.abs(runtime.score(ids) - expected.numpy()).max() < 1e-4 * float(np.ptp(expected.numpy()))
    with pytest.raises(InputError, match="which toys cannot count"):
        pipeline.open_model(replace(options, out=None, quantization=QuantizeOptions(bits=8, group_size=32)))


def test_another_packages_entry_point_is_a_backend_of_every_command(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing is registered by hand: the package says in its metadata that it has a backend."""
    package = tmp_path / "site" / "toy_backend-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backend\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        f"[{backends.ENTRY_POINTS}]\ntoy = support.toy_backend:INFO\nbroken = support.toy_backend:NOTHING\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(TESTS)])}

    def run(command: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", f"from gemma_edge.{command}.cli import main; main()", *map(str, args)]
        return subprocess.run(program, capture_output=True, text=True, env=environment)

    out = tmp_path / "bundle"
    sizes = ("--context", "16", "--prefill-chunk", "7", "--bits", "4", "--group-size", "32")
    done = run("export", checkpoint(), "--backend", "onnx,toy", *sizes, "--method", "rtn", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    verification = json.loads(done.stdout)["manifest"]["verification"]
    assert list(verification) == ["onnx", "toy"] and all(result["passed"] for result in verification.values())
    assert "the backend broken" in done.stderr and "cannot be used" in done.stderr
    told = run("runtimes", out, "--backend", "toy", "--prompt", "5,6,7", "--max-tokens", "4")
    assert told.returncode == 0, told.stderr
    assert "tflite-runtime, toy" in " ".join(run("export", "make", "--help").stdout.split())
    assert "toy" not in registered(), "this process has no such package"


def test_a_name_is_registered_once() -> None:
    register(registered()["onnx"])  # the same again
    with pytest.raises(ValueError, match="another backend 'onnx'"):
        register(replace(INFO, name="onnx"))


def test_every_entry_names_things_that_are_there_and_survives_json() -> None:
    for name, info in registered().items():
        assert info.name == name and set(info.kv_dtypes) <= set(backends.KV_DTYPES.values())
        half = info.load_exporter()
        assert half.name == name
        again = convert(json.loads(json.dumps(asdict(info))), BackendInfo)
        assert again == info
