"""What the campaigns `kill`, `disk` and `memory` share: exports in processes with everything imported, and what they leave."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from support.checkpoints import DEMO

from campaigns.campaign import outcome_of
from gemma_edge.bundle import staging
from gemma_edge.bundle.manifest import Manifest, check_hashes
from gemma_edge.errors import InputError
from gemma_edge.export.cli import main

SECONDS = 120.0
WORDS = ("--quality", "fast", "--verify", "none", "--context", "256", "--force")


def make(out: Path, *, bits: int = 8) -> None:
    """`gemma-export` of the demo model, in this process; it ends as the command does."""
    main([str(DEMO), "-o", str(out), "--bits", str(bits), *WORDS])


def start(errors: Path, block: Callable[[], None]) -> int:
    """Run a block in a forked process, which writes its stderr to `errors`; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        block()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001, as Python itself would
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int | None:
    """The exit code, negative for a signal; None if it had to be killed because it took too long."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def whole(out: Path) -> str:
    """The recipe of the bundle that is there, complete; empty if there is none.

    Raises:
        InputError: it is half a bundle.
    """
    if not out.exists():
        return ""
    manifest = Manifest.load(out)
    check_hashes(out, manifest)
    return manifest.recipe.name


def left(out: Path, *, cleaned: bool) -> list[str]:
    """What lies beside a bundle, before or after the next export has cleaned up."""
    if cleaned:
        staging._clean_leftovers(Path(os.path.realpath(out)))
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


def one_limited(folder: Path, out: Path, limit: Callable[[], None]) -> tuple[str, str]:
    """Export under a limit, and look at what is there: the outcome, and what is wrong.

    Args:
        folder: for the export's stderr.
        out: the bundle, which may exist.
        limit: sets the limit, in the process of the export.
    """

    def limited() -> None:
        limit()
        make(out)

    errors = folder / "stderr"
    before = whole(out)
    code = wait(start(errors, limited))
    printed = errors.read_text(errors="replace")
    if code is None:
        return "hang", printed[-300:]
    outcome = outcome_of(code, printed)
    try:
        after, rest = whole(out), left(out, cleaned=False)
    except InputError as error:
        return "left_over", f"half a bundle: {error}"
    if rest or (outcome == "refused" and after != before):
        return "left_over", f"{rest} {before!r} became {after!r}"
    return outcome, printed[-600:]


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A folder for a campaign, with a cache of its own in it; everything an export imports is imported."""
    import torch

    import gemma_edge.export.api
    import gemma_edge.export.onnx.backend
    import gemma_edge.export.report  # noqa: F401

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        os.environ["GEMMA_EDGE_CACHE"] = str(Path(folder, "cache"))
        yield Path(folder)
