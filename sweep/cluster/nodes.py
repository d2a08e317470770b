"""The nodes that a sweep runs on: Dask's workers, on this machine or on those of a scheduler that is running already.

Dask places a unit where its resources are, and runs it again where its node was lost. docs/measure/sweeps.md says why it is Dask.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, LocalCluster

from gemma_edge.bench import machine
from gemma_edge.errors import InputError, one_line
from gemma_edge.memory import room_bytes
from gemma_edge.sweep.cluster import carried, process, work
from gemma_edge.sweep.cluster.store import Record, Store
from gemma_edge.sweep.options import named_phones
from gemma_edge.sweep.units import CORES, GPU, PHONE_PREFIX, QUIET, RAM, Unit, phone_resource

ANSWER_S = 5.0  # how long a scheduler may take to answer
SPARE_THREADS = 4  # of a node, for phones and benchmarks beside what takes its cores
RAM_PART = 0.9  # part of the machine's free memory that units may take
# NOWHERE: Dask always opens a port for its status pages; this one nobody else can reach, and it is never taken
NOWHERE = "127.0.0.1:0"
START = "start one with: gemma-sweep node ADDRESS"


def sees_gpu() -> bool:
    """Whether torch sees a GPU. Where torch is not loaded, a process that ends asks: a node does without its memory."""
    if "torch" in sys.modules:
        return bool(sys.modules["torch"].cuda.is_available())
    question = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], capture_output=True, check=False).returncode == 0


def own_resources(phones: Collection[str], *, quiet: bool = True, gpu: bool = True) -> dict[str, float]:
    """What this machine offers as a node: cores, bytes of memory, whether things can be timed on it, a GPU, and its phones."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ram = RAM_PART * (room_bytes() or machine.describe().get("ram_bytes", 1 << 40))
    flags = {QUIET: quiet, GPU: gpu and sees_gpu()}
    there = {name: 1.0 for name, offered in flags.items() if offered}
    return {CORES: cores, RAM: ram, **there, **{phone_resource(one): 1.0 for one in phones}}


def threads_of(resources: Mapping[str, float]) -> int:
    """How many threads a worker needs, so that resources alone limit what runs at once."""
    return int(resources[CORES]) + len(resources) + SPARE_THREADS


@dataclass(frozen=True)
class Node:
    """One of the workers."""

    address: str
    name: str
    resources: Mapping[str, float]

    def offers(self, needs: Mapping[str, float]) -> bool:
        """Whether it has all of that when it is idle."""
        return all(self.resources.get(name, 0) >= amount for name, amount in needs.items())


class Nodes:
    """The nodes of a sweep, in use."""

    def __init__(self, client: Client, store: Store) -> None:
        self._client, self._store, self._sweep = client, store, secrets.token_hex(6)
        self.carries = False  # whether results travel through Dask, because nodes do not see the store
        self._parcels: dict[str, Any] = {}  # id of a unit -> its packed result, where Dask keeps it

    def now(self) -> list[Node]:
        """The nodes that are there at the moment."""
        workers: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return [
            Node(address, str(known.get("name", address)), known.get("resources") or {})
            for address, known in workers.items()
        ]

    def first_to_join(self) -> list[Node]:
        """The nodes that are there as soon as one is; [] if none comes within ANSWER_S."""
        with suppress(TimeoutError):
            self._client.wait_for_workers(1, timeout=ANSWER_S)
        return self.now()

    def start(self, unit: Unit, attempt: int, avoid: Collection[str]) -> Future:
        """Have a unit done; on a node that is not in `avoid` where another one offers what it needs."""
        able = [node.address for node in self.now() if node.offers(unit.needs)]
        elsewhere = [address for address in able if address not in avoid]
        for other in unit.after.values() if attempt else ():
            self._parcels.pop(other.id, None)  # the node that kept it may be the one that was lost
        told: list[Any] = [{kind: self._parcel(other) for kind, other in unit.after.items()}] if self.carries else []
        return self._client.submit(
            carried.run_carried if self.carries else work.run_unit,
            unit,
            self._store,
            self._sweep,
            *told,
            key=f"{unit.id}-{self._sweep}-{attempt}",
            pure=False,
            resources=dict(unit.needs),
            workers=elsewhere if avoid and elsewhere else None,
            priority=PRIORITIES.get(unit.kind, 0),
        )

    def _parcel(self, unit: Unit) -> Any:
        """The packed result of a unit, sent once."""
        if unit.id not in self._parcels:
            self._parcels[unit.id] = self._client.scatter(carried.pack(self._store.place(unit)), hash=False)
        return self._parcels[unit.id]

    def taken(self, unit: Unit, future: Future) -> Record:
        """The record of a unit that ended well, whose result is then in the store."""
        if not self.carries:
            record: Record = future.result()
            return record
        record, packed = future.result()
        carried.unpack(packed, self._store.place(unit))
        return record

    def machines(self) -> list[str]:
        """The processors of the nodes on which things are timed."""
        quiet = [node.address for node in self.now() if QUIET in node.resources]
        facts = self._client.run(machine.describe, workers=quiet) if quiet else {}
        return sorted({str(each["name"]) for each in facts.values()})

    def phones(self, requested: str) -> list[str]:
        """Serial numbers of the phones that are requested and offered.

        Raises:
            InputError: none is offered, or one of those that are named is not.
        """
        resources = {name for node in self.now() for name in node.resources}
        offered = {name.removeprefix(PHONE_PREFIX) for name in resources if name.startswith(PHONE_PREFIX)}
        named = named_phones(requested)
        names = sorted(offered) if named is None else named
        missing = [name for name in names if name not in offered]
        if missing or not names:
            seen = ", ".join(sorted(offered)) or "none"
            raise InputError(
                f"`phones` {missing[0] if missing else requested}: the nodes offer {seen}",
                field="phones",
                value=requested,
                hint="start a node with gemma-sweep node ADDRESS --phones all",
            )
        return names

    def blind(self, path: Path) -> list[str]:
        """The nodes that see nothing at a path."""
        seen = self._client.run(work.sees, path)
        return sorted(address for address, sees in seen.items() if not sees)

    def stop(self) -> None:
        """End what still runs for this sweep."""
        self._client.run(process.stop, self._sweep, on_error="ignore")


# PRIORITIES: what is done first. Benchmarks last: they need a quiet machine, and other work would wait for them.
PRIORITIES = {"merge": 2, "reference": 2, "quantize": 1, "bench": -1, "phone": 1}


@contextmanager
def nodes(address: str | None, store: Store, retries: int, phones: Collection[str]) -> Iterator[Nodes]:
    """The nodes of a scheduler, or this machine as the only one, started here and ended here.

    Args:
        address: of the scheduler; None: this machine.
        store: what all of them see.
        retries: how often a unit is run again after its node was lost.
        phones: serial numbers of this machine's phones, where it is the node.

    Raises:
        InputError: no scheduler answers, or its workers do not say what they offer.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    settings = {
        "distributed.scheduler.allowed-failures": retries,
        "distributed.comm.timeouts.connect": ANSWER_S,
        "distributed.admin.tick.limit": "1h",
    }
    with dask.config.set(settings):
        if address is None:
            offers = own_resources(phones)
            with (
                LocalCluster(
                    n_workers=1,
                    processes=False,
                    threads_per_worker=threads_of(offers),
                    resources=offers,
                    memory_limit=0,
                    dashboard_address=NOWHERE,
                    worker_dashboard_address=NOWHERE,
                ) as cluster,
                Client(cluster) as client,
            ):
                yield Nodes(client, store)
            return
        with _connected(address) as client:
            running = Nodes(client, store)
            there = running.now() or running.first_to_join()
            if not there:
                raise InputError(f"`address` {address}: no node has joined this scheduler", field="address", hint=START)
            if not any(CORES in node.resources for node in there):
                raise InputError(
                    f"`address` {address}: none of its {len(there)} workers says how many cores it offers",
                    field="address",
                    hint=f"{START}, or with dask worker --resources 'cores=8 ram=3e10 bench=1'",
                )
            yield running


def _connected(address: str) -> Client:
    try:
        return Client(address, timeout=ANSWER_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"`address` {address} does not answer ({one_line(error)})",
            field="address",
            value=address,
            hint="give the address that the scheduler printed, such as tcp://HOST:8786, or leave it out for this machine",
        ) from None


def join(address: str, offers: Mapping[str, float], name: str | None) -> None:
    """Be a node of a scheduler until it ends.

    Raises:
        InputError: it does not answer.
    """
    import asyncio

    from distributed import Worker

    _connected(address).close()  # a worker would print lines before it gave up

    async def run() -> None:
        with dask.config.set({"distributed.comm.timeouts.connect": ANSWER_S}):
            try:
                worker = await asyncio.wait_for(
                    Worker(
                        address,
                        nthreads=threads_of(offers),
                        resources=dict(offers),
                        memory_limit=0,
                        dashboard=False,
                        dashboard_address=NOWHERE,
                        name=name,
                    ),
                    ANSWER_S + 2,
                )
            except (OSError, TimeoutError, ValueError) as error:
                raise InputError(f"`address` {address} does not answer ({one_line(error)})", field="address") from None
            await worker.finished()

    asyncio.run(run())
