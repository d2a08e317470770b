"""Exports that are ended at random moments by SIGKILL, SIGTERM and SIGHUP: no half bundle, and the one before is never lost.

PYTHONPATH=tests .venv/bin/python -m campaigns.kill --tries 200 --seed 7
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from campaigns import exports
from campaigns.campaign import Campaign, main
from gemma_edge.errors import InputError

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


def one_try(folder: Path, previous: Path | None, ended_by: signal.Signals, after_s: float) -> tuple[str, str]:
    """End an export, and look at what is there: the outcome, and what is wrong."""
    out, errors = folder / "here" / "out", folder / "stderr"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    if previous is not None:
        shutil.copytree(previous, out)
    before = exports.whole(out)
    pid = exports.start(errors, lambda: exports.make(out))
    time.sleep(after_s)
    os.kill(pid, ended_by)
    code = exports.wait(pid)
    printed = errors.read_text(errors="replace")
    if code is None:
        return "hang", printed[-300:]
    if code not in (0, -ended_by) and (code != 128 + ended_by or "Traceback" in printed):
        return "traceback", f"exit code {code}: {printed[-600:]}"
    quick = [] if ended_by == signal.SIGKILL or code == -ended_by else exports.left(out, cleaned=False)
    try:
        after = exports.whole(out)
        rest = exports.left(out, cleaned=True)
        recipe = exports.whole(out)
    except InputError as error:
        return "left_over", f"half a bundle: {error}"
    if quick or rest or (before and not after) or recipe != after:
        return "left_over", f"{quick} {rest} {before!r} became {after!r}"
    return "correct", ""


def run(campaign: Campaign, tries: int) -> None:
    """End exports, every other one of which replaces a bundle."""
    with exports.place() as folder:
        previous, began = folder / "previous", time.monotonic()
        assert exports.wait(exports.start(folder / "stderr", lambda: exports.make(previous, bits=4))) == 0
        whole_s = time.monotonic() - began
        for index in range(tries):
            ended_by, late = campaign.random.choice(SIGNALS), campaign.random.random() < 0.4
            after_s = whole_s * campaign.random.uniform(0.8 if late else 0.0, 1.1 if late else 1.0)
            outcome, what = one_try(folder, previous if index % 2 else None, ended_by, after_s)
            campaign.tried(outcome, f"{ended_by.name} after {after_s:.3f} of {whole_s:.3f} s: {what}")


if __name__ == "__main__":
    main("kill", run, tries=200)
