"""The child of the campaign `bundles`: opens bundles and uses them, one after the other, until one ends it."""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

import numpy as np

from gemma_edge.errors import InputError
from gemma_edge.runtimes.engines.load import open_runtime
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

MEMORY_BYTES = 12 << 30  # limit of address space, so that a damaged size does not take the machine's memory


def answer_of(bundle: str, backend: str) -> dict[str, Any]:
    """Open a bundle and use it: a prompt over several chunks, tokens one by one, scores, a state."""
    try:
        runtime = open_runtime(bundle, backend=backend, threads=1)
        if runtime.manifest.tokenizer:
            ids = Tokenizer(runtime.bundle, runtime.manifest).encode("And the LORD said unto Moses, Go")
            ChatTemplate.from_bundle(runtime.bundle)
        ids = [(7 * index + 3) % runtime.vocab_size for index in range(20)]
        rows = [runtime.prefill(ids), runtime.decode(1), *runtime.score(ids[:9])]
        runtime.restore(runtime.snapshot())
        rows.append(runtime.decode(2))
    except InputError as error:
        lines = " ".join(error.spelled(str).split())
        return {"outcome": "refused" if len(lines) < 1200 else "traceback", "what": lines}
    except Exception as error:  # noqa: BLE001, it is counted
        return {"outcome": "traceback", "what": f"{type(error).__name__}: {error}"}
    return {"outcome": "correct", "what": [float(np.nan_to_num(row).sum()) for row in rows]}


def work() -> None:
    """In a child: a line with a bundle comes in, a line with its outcome goes out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    for line in sys.stdin:
        replies.write(json.dumps(answer_of(**json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    work()
