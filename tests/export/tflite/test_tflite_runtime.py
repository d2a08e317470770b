"""The tflite-runtime backend in tflite-runtime itself, which lives in an environment of its own, without torch and LiteRT."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from support.checkpoints import DEMO, ROOT, hf_logits, hf_model, hf_windowed, relative_error

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'gemma-edge[tflite]'")

from support.lowered import some_ids
from support.tflite_bundles import UNEVEN, assert_holds_integers, make_bundle, reference

from gemma_edge.bundle.manifest import Manifest
from gemma_edge.errors import InputError
from gemma_edge.export import api as pipeline
from gemma_edge.export.cli import main
from gemma_edge.export.options import ExportOptions
from gemma_edge.export.plan import geometry
from gemma_edge.export.tflite.backend import TFLITE_RUNTIME as BACKEND
from gemma_edge.export.tflite.check import check_tflite
from gemma_edge.export.tflite.packing import LITERT, TFLITE_RUNTIME
from gemma_edge.export.tflite.seams import signatures
from gemma_edge.model.checkpoint import TABLE, weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint
from gemma_edge.quantize.options import QuantizeOptions
from gemma_edge.quantize.recipe import QuantConfig, make_recipe

NAME, FILE = BACKEND.name, BACKEND.file
PYTHON = ROOT / "out" / "tflite-runtime" / "bin" / "python"
there = pytest.mark.skipif(not PYTHON.exists(), reason="no environment with tflite-runtime: make tflite-runtime")
RECIPES = {"float": make_recipe(32), "int8": make_recipe(8, method="rtn"), "untied": make_recipe(8, method="rtn")}

RUN = """
import importlib.util, json, sys
import numpy as np
import gemma_edge
from support.rewinding import worst_error
for name in ("torch", "ai_edge_litert", "onnxruntime"):
    assert importlib.util.find_spec(name) is None, f"{name} is here: this environment proves nothing"
task = json.loads(sys.argv[1])
runtime = gemma_edge.load(task["bundle"])
assert type(runtime).__module__ == "gemma_edge.runtimes.engines.tflite_runtime"
ids, ends = task["ids"], np.cumsum(task["uneven"])
uneven = np.stack([runtime.prefill(ids[end - size : end]) for end, size in zip(ends, task["uneven"])])
many = runtime.decode_many(ids[:5])
score = runtime.score(ids)
runtime.reset()
found = {"uneven": uneven, "many": many, "score": score, "whole": runtime.prefill(ids)}
if task["rewind"]:
    found["rewind"] = np.array(worst_error(runtime, ids[:60], range(0, 50, 5), (1, 2, 5, 9, 15, 19)))
np.savez(task["out"], **found)
"""

RUN_PINNED = """
import json, sys
import numpy as np
import gemma_edge
task = json.loads(sys.argv[1])
runtime, found = gemma_edge.load(task["bundle"]), {}
for pinned in task["pinned"]:
    runtime.reset()
    runtime.pin(pinned)
    parts = np.split(np.array(task["ids"]), np.cumsum(task["uneven"])[:-1])
    found[str(pinned)] = np.concatenate([runtime.decode_many(part.tolist()) for part in parts])
np.savez(task["out"], **found)
"""


def run_there(bundle: Path, ids: list[int], *, script: str = RUN, **more: Any) -> dict[str, NDArray[Any]]:
    """What a script finds in the other environment. RUN: after uneven chunks, position by position, and all at once."""
    out = bundle.parent / "found.npz"
    task = {"bundle": str(bundle), "ids": ids, "uneven": UNEVEN, "out": str(out), "rewind": False, **more}
    done = subprocess.run(
        [PYTHON, "-c", script, json.dumps(task)],
        env={"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(np.load(out))


@pytest.fixture(scope="module")
def bundles(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[QuantizedCheckpoint, Path]]:
    return {
        name: make_bundle(
            checkpoint("untied" if name == "untied" else "tiny"),
            tmp_path_factory.mktemp(name),
            recipe,
            context=16,
            name=NAME,
        )
        for name, recipe in RECIPES.items()
    }


@there
def test_float_model_equals_transformers_in_uneven_chunks_past_the_windows(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The context holds the text; local layers wrap ten times."""
    folder, ids = checkpoint(), some_ids(sum(UNEVEN), 320)
    _, bundle = make_bundle(folder, tmp_path, RECIPES["float"], context=96, name=NAME)
    found, expected = run_there(bundle, ids), hf_logits(hf_model(folder), torch.tensor(ids))
    for rows, positions in (("uneven", np.cumsum(UNEVEN) - 1), ("score", slice(None)), ("whole", -1)):
        assert relative_error(torch.from_numpy(found[rows]), expected[positions]) < 1e-5, rows


@there
@pytest.mark.parametrize("recipe", RECIPES)
def test_integers_run_five_contexts_and_stay_with_torch(
    recipe: str, bundles: dict[str, tuple[QuantizedCheckpoint, Path]]
) -> None:
    quantized, bundle = bundles[recipe]
    ids = some_ids(sum(UNEVEN), quantized.config.vocab_size)
    assert len(ids) > 5 * 16
    found, expected = run_there(bundle, ids, rewind=recipe == "float"), reference(quantized, ids, context=16)
    # activations are int8 here and float there, on random weights of standard deviation 1
    bound = 1e-5 if recipe == "float" else 0.15
    for rows, positions in (("uneven", np.cumsum(UNEVEN) - 1), ("score", slice(None)), ("whole", -1)):
        assert relative_error(torch.from_numpy(found[rows]), expected[positions]) < bound, rows
    assert relative_error(torch.roll(expected, 1, dims=0), expected) > 0.5, "the bound would let wrong positions pass"
    assert found["many"].shape == (5, quantized.config.vocab_size)
    if recipe == "float":
        worst, free, again = found["rewind"]
        assert worst < 1e-3 and free > 10 and again > 10  # logits of a range of 60


@there
def test_the_beginning_of_a_text_stays_visible(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Twenty contexts long, in the global layers; pinned anew and no more."""
    folder, context = checkpoint("gemma3_odd"), 24
    uneven = UNEVEN * 6
    assert sum(uneven) > 20 * context
    _, bundle = make_bundle(folder, tmp_path, RECIPES["float"], context, 7, name=NAME, pinned=9)
    model = hf_model(folder)
    window, ids = Manifest.load(bundle).config.sliding_window, some_ids(sum(uneven), model.config.vocab_size)
    found = run_there(bundle, ids, script=RUN_PINNED, uneven=uneven, pinned=[5, 0, 9])
    right = {
        pinned: hf_windowed(model, torch.tensor(ids), local_window=window, global_window=context, pinned=int(pinned))
        for pinned in found
    }
    for pinned, logits in found.items():
        assert relative_error(torch.from_numpy(logits), right[pinned]) < 1e-4, pinned
    assert relative_error(right["5"], right["0"]) > 1e-2, "the bound would let no pin pass"


@pytest.mark.parametrize("recipe", ["int8", "untied"])
def test_model_holds_the_checkpoints_integers_and_scales_bit_for_bit(
    recipe: str, bundles: dict[str, tuple[QuantizedCheckpoint, Path]]
) -> None:
    quantized, bundle = bundles[recipe]
    seen = assert_holds_integers(bundle / FILE, quantized, float_scales=True)
    assert seen[-1] == ("FULLY_CONNECTED", quantized.config.head)
    # a tied table is read twice
    assert len(seen) == len(weight_shapes(quantized.config)) + quantized.config.tie_word_embeddings


def test_a_file_that_holds_something_else_is_found_out(bundles: dict[str, tuple[QuantizedCheckpoint, Path]]) -> None:
    quantized, bundle = bundles["int8"]
    path, config, configs = bundle / FILE, quantized.config, quantized.configs
    cache = Manifest.load(bundle).backends[NAME].cache
    found = signatures(cache)
    check_tflite(path, TFLITE_RUNTIME, config, configs, cache, found)
    with pytest.raises(RuntimeError, match="scales"):  # what is silently zero there: a scale per channel in the weight
        check_tflite(path, LITERT, config, configs, cache, found)
    with pytest.raises(RuntimeError, match=TABLE):
        check_tflite(path, TFLITE_RUNTIME, config, {**configs, TABLE: None}, cache, found)
    with pytest.raises(RuntimeError, match="prefill_16 takes"):
        check_tflite(path, TFLITE_RUNTIME, config, configs, geometry(config, 17, 16, backend=NAME), found)
    size = path.stat().st_size - TFLITE_RUNTIME.weights_bytes(config, configs)
    assert 0 < size < 300_000, "what the plan says of the size"


@pytest.mark.parametrize(
    ("weight", "config", "said"),
    [
        ("model.layers.0.mlp.up_proj", QuantConfig(4, 0), "4 bits.*multiplies 8 only; use bits 8"),
        ("model.layers.0.mlp.up_proj", QuantConfig(8, 64), "8 bits in groups of 64.*use group_size 0"),
        (TABLE, QuantConfig(4, 0), "use table_bits 8"),
    ],
)
def test_what_tflite_runtime_computes_wrongly_is_refused(weight: str, config: QuantConfig, said: str) -> None:
    with pytest.raises(InputError, match=said):
        BACKEND.refuse_weight(weight, config, 64, 32)


def options(tmp_path: Path, **changes: Any) -> ExportOptions:
    chosen = {"backend": NAME, "quantization": QuantizeOptions(bits=8, method="rtn"), "context": 64, **changes}
    return ExportOptions(str(DEMO), out=tmp_path / "bundle", **chosen)


@there
def test_the_gate_runs_the_bundle_there_and_gemma_run_too(tmp_path: Path) -> None:
    """Of two backends each in its own environment; there, the one that can run there is found."""
    done = pipeline.export(options(tmp_path, backend=f"tflite,{NAME}", runtime_python=PYTHON))
    assert all(result.passed and result.past_wrap for result in done.manifest.verification.values())
    assert list(done.manifest.verification) == ["tflite", NAME]
    said = subprocess.run(
        [PYTHON.with_name("gemma-run"), done.bundle, "--prompt", "And the LORD said unto", "--max-tokens", "8"],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0 and said.stderr == "" and len(said.stdout.split()) > 2, said.stderr


@there
def test_a_damaged_model_is_one_line(tmp_path: Path, bundles: dict[str, tuple[QuantizedCheckpoint, Path]]) -> None:
    _, bundle = bundles["int8"]
    for path in bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / FILE).write_bytes(b"\0" * (tmp_path / FILE).stat().st_size)
    done = subprocess.run([PYTHON.with_name("gemma-run"), tmp_path, "--prompt", "5,6"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "damaged" in done.stderr, done.stderr


def test_without_that_environment_an_export_says_how_to_make_it_or_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pip install 'gemma-edge\[tflite-runtime\]'.*runtime_python.*NOT VERIFIED"):
        pipeline.open_model(options(tmp_path))
    with pytest.raises(InputError, match="nowhere/python cannot run tflite-runtime bundles.*No such file"):
        pipeline.open_model(options(tmp_path, runtime_python=Path("nowhere/python")))
    pipeline.open_model(options(tmp_path), plan_only=True)
    done = pipeline.export(options(tmp_path, verify="none"))
    shown = CliRunner().invoke(main, ["inspect", str(done.bundle)])
    assert "NOT VERIFIED" in shown.output and "backends: tflite-runtime" in shown.output
