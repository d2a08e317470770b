"""The units of work of a sweep: what each computes from which others, and what identifies it.

A unit is done once. Its key is a hash of everything that its result depends on, so that another sweep, or this one after it was
killed, finds the result in the store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_edge.bench.process import ChildFailed
from gemma_edge.bench.result import Settings
from gemma_edge.errors import InputError
from gemma_edge.export.options import ExportOptions

CHECKPOINT, BUNDLE = "checkpoint", "bundle"  # folders in a unit's own
# Kinds of units. The figures in a sweep's result count by them.
MERGE, QUANTIZE, LOWER, REFERENCE, EVALUATE, BENCH, PHONE, JUDGE = (
    *("merge", "quantize", "lower", "reference", "evaluate", "bench", "phone", "judge"),
)
CORES, RAM, QUIET, GPU = "cores", "ram", "bench", "gpu"  # resources of a node; phones have one each: phone:SERIAL

PHONE_PREFIX = "phone:"


def phone_resource(serial: str) -> str:
    """The resource of one phone."""
    return f"{PHONE_PREFIX}{serial}"


@dataclass(frozen=True)
class Job:
    """What a unit is told. Each kind reads its part."""

    options: ExportOptions
    texts: tuple[Path, ...] = ()
    tokens: int = 0
    window: int = 0
    threads: int = 1
    settings: Settings | None = None  # of a benchmark
    phone: str = ""  # serial number
    answer_s: float = 0.0  # of a phone
    cool_s: float = 0.0  # of a phone
    split: bool = False  # whether idle nodes help with a calibration
    helpers: Callable[[], AbstractContextManager[Any]] | None = None  # those, set by the node that does the unit


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    kind: str
    key: str
    what: str  # for people
    job: Job
    after: Mapping[str, Unit] = field(default_factory=dict)  # kind -> the unit whose result this one needs
    needs: Mapping[str, float] = field(default_factory=dict)  # resource -> how much of it

    @property
    def id(self) -> str:
        """Kind and key."""
        return f"{self.kind}/{self.key}"


def key_of(*parts: object) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def compute(unit: Unit, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Do the work of a unit.

    Args:
        unit: what to do.
        folder: empty; files of the result go there.
        inputs: kind -> the folder of a unit that it needs.

    Returns:
        the result's figures.

    Raises:
        InputError: it cannot be done, and never will.
        ChildFailed: it failed, and may succeed elsewhere.
    """
    return _COMPUTE[unit.kind](unit.job, folder, inputs)


def _merge(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """The original of a point with an adapter or a smaller vocabulary, in float."""
    from gemma_edge.quantize.api import quantize
    from gemma_edge.quantize.options import QuantizeOptions

    options = job.options
    quantize(options.model, folder / CHECKPOINT, QuantizeOptions(bits=32), lora=options.lora, vocab=options.vocab)
    return {}


def _quantize(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    from gemma_edge.export.api import open_model
    from gemma_edge.progress import no_progress
    from gemma_edge.quantize.api import Quantization, choose_calibration, make_checkpoint
    from gemma_edge.quantize.calibration.windows import in_turn

    opened = open_model(job.options, plan_only=True)
    quantization = job.options.quantization
    seen = choose_calibration(quantization, opened.source, opened.recipe)
    work = Quantization(quantization, opened.source, opened.recipe, seen)
    with job.helpers() if job.helpers is not None else nullcontext(in_turn) as each:
        _, learnt = make_checkpoint(work, folder / CHECKPOINT, no_progress, [], each)
    return {"learnt": learnt}


def _lower(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    return _export(replace(job.options, verify="none"), folder, inputs)


def _judge(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    return _export(job.options, folder, inputs)


def _export(options: ExportOptions, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Lower, or judge what was lowered: the integers are ready."""
    from gemma_edge.export.api import Ready, export, open_model

    quantized = inputs[QUANTIZE]
    learnt = json.loads((quantized / RECORD).read_text(encoding="utf-8"))["result"]["learnt"]
    lowered = inputs[LOWER] / BUNDLE if LOWER in inputs else None
    options = replace(options, out=folder / BUNDLE)
    opened = open_model(options)
    done = export(options, opened=opened, ready=Ready(quantized / CHECKPOINT, learnt, lowered))
    return {"bytes": done.manifest.bytes}


def _reference(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    from gemma_edge.evaluate.evaluate import evaluate
    from gemma_edge.evaluate.options import EvaluationOptions

    options = EvaluationOptions((), _original(job, inputs), job.texts, window=job.window, max_tokens=job.tokens)
    reference = evaluate(options, reference_folder=folder).reference
    assert reference is not None, "it was requested"
    return {"ppl": reference.ppl, "tokens": reference.tokens}


def _evaluate(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    from gemma_edge.evaluate.evaluate import evaluate
    from gemma_edge.evaluate.options import EvaluationOptions

    options = EvaluationOptions(
        (inputs[LOWER] / BUNDLE,),
        _original(job, inputs),
        job.texts,
        window=job.window,
        max_tokens=job.tokens,
        backend=job.options.backend,
        threads=job.threads,
    )
    (result,) = evaluate(options, reference_folder=inputs[REFERENCE]).results
    names = ("kl", "top1", "ppl", "ppl_change", "tokens", "bits_per_weight")
    return {name: getattr(result, name) for name in names}


def _original(job: Job, inputs: Mapping[str, Path]) -> Path:
    from gemma_edge.model import hub

    return inputs[MERGE] / CHECKPOINT if MERGE in inputs else hub.resolve(job.options.model)


def _bench(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    from gemma_edge.bench import bench

    contenders, _ = bench.bundle_contenders([inputs[LOWER] / BUNDLE], job.options.backend)
    return _measured(contenders[0], job)


def _measured(contender: Any, job: Job) -> dict[str, Any]:
    """One measurement, with its medians and samples.

    Raises:
        ChildFailed: it failed.
    """
    from dataclasses import asdict

    from gemma_edge.bench import bench, stats

    assert job.settings is not None
    result = bench.measure(contender, job.settings)
    if result.failure:
        raise ChildFailed(result.failure)
    return {"summary": stats.summary([result]), "result": asdict(result)}


def _phone(job: Job, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    from gemma_edge.bench import adb, phones
    from gemma_edge.progress import no_progress
    from gemma_edge.sweep.shelf import cool_down, throttled

    device = adb.Device(adb.find_adb(), job.phone)
    status = cool_down(device, job.cool_s)
    request = phones.Request(job.options.backend, answer_s=job.answer_s, keep=False)
    try:
        with phones.on_phones([device], [inputs[LOWER] / BUNDLE], request, no_progress) as contenders:
            found = _measured(contenders[0], job)
            return {**found, "thermal_status": status, "throttled": throttled(found["result"])}
    except InputError as error:  # of a phone that was unplugged: another attempt may find it again
        raise ChildFailed(str(error)) from None


RECORD = "unit.json"  # file of a finished unit: its figures, and what it took
_COMPUTE = {
    MERGE: _merge,
    QUANTIZE: _quantize,
    LOWER: _lower,
    REFERENCE: _reference,
    EVALUATE: _evaluate,
    BENCH: _bench,
    PHONE: _phone,
    JUDGE: _judge,
}
