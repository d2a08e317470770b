"""Compare the logits that Kotlin wrote with Python's, where kernels of another instruction set computed them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gemma_edge.comparison import Comparison

# MAX_KL: nats; kernels that round activations to int8 differ by less than 0.002 between instruction sets.
MAX_KL = 0.005


def compare(fixtures: Path, backend: str) -> str:
    """Compare the logits of every bundle after every call, and describe the result in one line.

    Raises:
        SystemExit: a most likely token differs, or the KL divergence is too large.
    """
    lines = []
    for written in sorted(fixtures.glob(f"from-kotlin/*/{backend}.f32")):
        model = fixtures / "models" / written.parent.name
        calls = len(json.loads((model / "answers.json").read_text(encoding="utf-8"))["calls"])
        expected, actual = (np.fromfile(path, "<f4").reshape(calls, -1) for path in (model / "runtime.f32", written))
        comparison = Comparison()
        comparison.add(actual, expected, expected.argmax(-1))
        kl = comparison.kl / calls
        line = f"{model.name}: same top token {comparison.same_top1} of {calls}, KL {kl:.5f} nats"
        if comparison.same_top1 < calls or not kl < MAX_KL:
            raise SystemExit(f"{backend}: {line}; at most {MAX_KL} is allowed")
        lines.append(line)
    if not lines:
        raise SystemExit(f"{backend}: Kotlin wrote no logits into {fixtures}/from-kotlin")
    return "; ".join(lines)
