"""The public API, pinned: names, signatures, and that a user's own script passes mypy --strict."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_edge

SIGNATURES = {
    "evaluate": "(options: 'EvaluationOptions', progress: 'Progress' = no_progress) -> 'Evaluation'",
    "export": "(options: 'ExportOptions', progress: 'Progress' = no_progress) -> 'Export'",
    "inspect": "(bundle: 'str | Path', *, check_hashes: 'bool' = False) -> 'Manifest'",
    "load": "(bundle: 'str | Path', *, backend: 'str | None' = None, threads: 'int | None' = None,"
    " accelerator: 'str | None' = None, adapter: 'str | Path | None' = None) -> 'Runtime'",
    "plan": "(options: 'ExportOptions', progress: 'Progress' = no_progress) -> 'dict[str, Plan]'",
    "quantize": "(model: 'str | Path', out: 'str | Path', options: 'QuantizeOptions | None' = None, *,"
    " lora: 'str | Path | None' = None, vocab: 'str | None' = None, force: 'bool' = False, progress: 'Progress' ="
    " no_progress) -> 'QuantizedModel'",
    "sweep": "(options: 'SweepOptions', progress: 'Progress' = no_progress) -> 'SweepResult'",
}
CLASSES = {
    "Adapter": ["folder", "manifest", "factors"],
    "Call": ["name", "arguments", "id"],
    "Tool": ["name", "description", "parameters"],
    "CalibrationText": ["paths", "tokens", "chat", "seed"],
    "EvaluationOptions": [
        *(
            "models",
            "reference",
            "texts",
            "protocol",
            "window",
            "max_tokens",
            "backend",
            "threads",
            "tasks",
            "memorization",
        ),
    ],
    "ExportOptions": [
        *(
            "model",
            "out",
            "target",
            "quantization",
            "context",
            "prefill_chunk",
            "pinned",
            "kv_bits",
            "backend",
            "accelerator",
            "lora",
            "vocab",
            "ram_gib",
        ),
        *("verify", "runtime_python", "keep_failed", "save_checkpoint", "force"),
    ],
    "GenerationOptions": [
        "max_tokens",
        "sampling",
        "stop",
        "strict",
        "json_schema",
        "speculate",
        "tools",
        "tool_choice",
        "parallel_calls",
    ],
    "Guard": ["bundle", "backend", "threads", "accelerator"],
    "QuantizeOptions": [
        *(
            "bits",
            "group_size",
            "table_bits",
            "embedding_bits",
            "head_bits",
            "size",
            "bpw",
            "recipe",
            "method",
            "quality",
            "calibration_text",
            "distill",
        ),
    ],
    "Recipe": ["name", "rules", "float_bits"],
    "SamplingParams": ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"],
    "Session": ["runtime", "tokenizer", "template", "options", "prefix", "adapter", "pin_system", "notify"],
    "SweepOptions": [
        *("base", "out", "space", "limits", "pick", "budget", "measuring", "where", "verify"),
    ],
    "InputError": ["problem", "field", "value", "allowed", "hint"],
}
SCRIPT = """
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gemma_edge


@contextmanager
def show(what: str, total: int, in_bytes: bool) -> Iterator[Callable[[int], None]]:
    print(what)
    yield lambda done: None


options = gemma_edge.ExportOptions(
    model="folder", out=Path("out"), quantization=gemma_edge.QuantizeOptions(bits=4, quality="fast")
)
try:
    needed: dict[str, int] = {name: plan.device_ram_bytes for name, plan in gemma_edge.plan(options).items()}
    made = gemma_edge.export(options, show)
    passed: bool = all(result.passed for result in gemma_edge.inspect(made.bundle, check_hashes=True).verification.values())
    folder = gemma_edge.quantize("folder", "checkpoint", gemma_edge.QuantizeOptions(bits=4), progress=show)
    measured = gemma_edge.evaluate(gemma_edge.EvaluationOptions(models=(made.bundle,), reference=Path("folder")))
    perplexity: float = measured.results[0].ppl
    swept = gemma_edge.sweep(gemma_edge.SweepOptions(options, Path("sweep"), {"bits": (4, 8)}, pick="kl"), show)
    front: list[str] = [row.name for row in swept.rows if row.front]
    runtime = gemma_edge.load(made.bundle, threads=2)
    logits = runtime.prefill([2, 10])
    session = gemma_edge.Session.open(made.bundle)
    for piece in session.send("Hello", gemma_edge.GenerationOptions(max_tokens=20)):
        print(piece, end="")
    tools = (gemma_edge.Tool("weather", "The weather.", {"type": "object", "properties": {}}),)
    for piece in session.send("Is it warm?", gemma_edge.GenerationOptions(tools=tools)):
        print(piece, end="")
    calls: tuple[gemma_edge.Call, ...] = session.calls
    for piece in session.reply([call.arguments for call in calls]):
        print(piece, end="")
    violates: float = gemma_edge.Guard("shieldgemma").score("hate", "Hello", "Hi.")
    recipe: gemma_edge.Recipe = folder.recipe
except gemma_edge.InputError as error:
    print(error, error.field, error.value, error.allowed, error.hint)
"""


def test_public_names_are_these() -> None:
    assert set(gemma_edge.__all__) == {*SIGNATURES, *CLASSES, "__version__"}
    assert set(gemma_edge.__all__) <= set(dir(gemma_edge))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_pinned(name: str) -> None:
    """Also once the package of that name was imported, which takes the function's place and passes calls on to it."""
    text = str(inspect.signature(getattr(gemma_edge, name)))
    function = gemma_edge.progress.no_progress
    assert text.replace(repr(function), "no_progress") == SIGNATURES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_of_public_classes_are_pinned(name: str) -> None:
    assert list(inspect.signature(getattr(gemma_edge, name)).parameters) == CLASSES[name]


@pytest.mark.parametrize(
    "first", ["", "import gemma_edge.export.api, gemma_edge.quantize.api, gemma_edge.sweep.options; "]
)
def test_functions_can_be_called_before_and_after_their_package_was_imported(first: str) -> None:
    code = (
        f"{first}import gemma_edge\n"
        "for call in (gemma_edge.export, gemma_edge.quantize, gemma_edge.evaluate, gemma_edge.sweep):\n"
        "    try: call()\n"
        "    except TypeError as error: assert 'missing' in str(error), error\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_neither_torch_nor_a_runtime() -> None:
    code = "import sys, gemma_edge; sys.exit(str({'torch', 'onnxruntime', 'transformers'} & set(sys.modules) or 0))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() in ("", "0")


def test_a_script_that_uses_all_of_it_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
