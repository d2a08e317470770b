"""gemma-edge: export Gemma 2 to phones, prove the result equal, and run it.

`load(bundle)` opens an exported bundle; the rest of the public API lives in `gemma_edge.export` and `gemma_edge.runtimes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_edge.runtimes.engines.base import Runtime

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(bundle: str | Path, *, backend: str | None = None, threads: int | None = None) -> Runtime:
    """Open a bundle made by `gemma-export` and return its runtime, ready for `prefill`, `decode` and `score`.

    Args:
        bundle: the bundle's folder.
        backend: which backend of the bundle to use; None takes the first one that is installed.
        threads: threads for the matrix products; None takes the bundle's target default.

    Raises:
        InputError: the folder is no bundle, is damaged, or needs a package that is not installed.
    """
    from gemma_edge.runtimes.engines.load import open_runtime

    return open_runtime(bundle, backend=backend, threads=threads)
