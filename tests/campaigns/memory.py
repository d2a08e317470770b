"""Exports with too little memory: refused in one line, before or on their way; nothing left behind, the bundle before it whole.

Every other try runs under a limit of addresses (`ulimit -v`) and finds out only on its way, because the check before an export is
left out. The others run in a cgroup, whose limit kills, so that check must know it. Where nobody may make one, all run under the
first kind of limit.

    PYTHONPATH=tests .venv/bin/python -m campaigns.memory --tries 40 --seed 7
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator

from campaigns import exports
from campaigns.campaign import Campaign, main
from gemma_edge import memory
from gemma_edge.export import api, room

MIB = 1 << 20
# What an export may take beyond what a process with everything imported has: from next to nothing to more than it needs. Of less
# than 64 MiB Python itself would not start in a cgroup.
ADDRESSES_MIB, GROUP_MIB = (0, 120), (64, 512)
Limit = Callable[[], None]  # called in the process of the export, before it begins


def limit_addresses(more: int) -> Limit:
    """`ulimit -v` at so many bytes more than are taken, without the checks before an export."""

    def limit() -> None:
        api.check_memory = lambda *args: None  # type: ignore[attr-defined]
        room.TORCH_ADDRESSES = 0
        taken = memory.taken_addresses()
        assert taken is not None
        most = taken + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return limit


@contextlib.contextmanager
def small_group(most: int) -> Iterator[Limit | None]:
    """A cgroup in which processes may take so many bytes; None where it cannot be made."""
    # of cgroups 1 and 2 together, the controller is in a group of the first
    _, own, (limit, _) = min(memory.memory_groups(), key=lambda group: group[0] == memory.CGROUPS)
    group = own / f"gemma-edge-{os.getpid()}"

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        group.mkdir()
        (group / limit).write_text(str(most))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield enter
    finally:
        group.rmdir()


def run(campaign: Campaign, tries: int) -> None:
    """Limits from next to nothing to more than a whole export takes, in random order."""
    with exports.place() as folder:
        previous, here = folder / "previous", folder / "here"
        assert exports.wait(exports.start(folder / "stderr", lambda: exports.make(previous, bits=4))) == 0
        for index in range(tries):
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            if index % 4:
                shutil.copytree(previous, here / "out")
            smallest, largest = GROUP_MIB if index % 2 else ADDRESSES_MIB
            more = campaign.random.randint(smallest, largest) * MIB
            with small_group(more) if index % 2 else contextlib.nullcontext() as group:
                limit = group or limit_addresses(more)
                outcome, what = exports.one_limited(folder, here / "out", limit)
            campaign.tried(outcome, f"{'cgroup' if group else 'addresses'} of {more >> 20} MiB: {what}")


if __name__ == "__main__":
    main("memory", run, tries=40)
