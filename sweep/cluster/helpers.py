"""Nodes that help with a calibration of another node: its jobs go to those that are idle, and come back in order.

The node that calibrates takes jobs from the end of the list, and each helper from the beginning, one at a time. What a helper has
not begun when nothing else is left, and what a lost helper had begun, the node does itself. So it never waits for cores.
"""

from __future__ import annotations

import pickle
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from distributed import Client, Future, get_worker

from gemma_edge.bench import machine
from gemma_edge.sweep.cluster.process import in_process
from gemma_edge.sweep.cluster.quiet import working
from gemma_edge.sweep.units import CORES

POLL_S = 0.05
LOOK_S = 1.0  # how often it is looked whether a helper is still there
PRIORITY = -2  # every unit of a sweep goes before


def assist(function: bytes, job: bytes, sweep: str, threads: int, topic: str, name: str) -> bytes:
    """Do a job on this node, in a process of its own. Says first that it begins.

    Raises:
        UnitFailed: it cannot be done, or its process died.
    """
    with working(alone=False, beside=True):  # a benchmark may hold the machine
        get_worker().log_event(topic, name)
        return in_process(partial(_apply, function, job), sweep, threads)


def _apply(function: bytes, job: bytes) -> bytes:
    return pickle.dumps(pickle.loads(function)(pickle.loads(job)))


@contextmanager
def helpers(scheduler: str, own: str, sweep: str, needs: Mapping[str, float]) -> Iterator[Helpers]:
    """The other nodes of a scheduler, for the unit that runs on the node `own`.

    Args:
        scheduler: its address.
        own: address of the node that calibrates.
        sweep: for `stop`.
        needs: what a job takes of a node.
    """
    with Client(scheduler, set_as_default=False, direct_to_workers=True) as client:
        yield Helpers(client, own, sweep, needs)


class Helpers:
    """Does jobs here and on the nodes that are idle: an `Each` of quantize/calibration/windows.py.

    Other processors may round differently, so only nodes with the same one help.
    """

    def __init__(self, client: Client, own: str, sweep: str, needs: Mapping[str, float]) -> None:
        self._client, self._own, self._sweep, self._needs = client, own, sweep, dict(needs)
        self._topic, self._begun = f"begun-{secrets.token_hex(6)}", set[str]()
        self._processors: dict[str, str] = {}  # address -> processor
        client.subscribe_topic(self._topic, lambda event: self._begun.add(event[1]))

    def __call__(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
        """The results, in the order of the jobs. What a job raises here is raised."""
        call = _Call(function, list(jobs))
        places = self._places() if len(call.jobs) > 1 else []
        threads = [threading.Thread(target=self._help, args=(call, each), daemon=True) for each in places]
        for thread in threads:
            thread.start()
        try:
            while len(call.results) < len(call.jobs):
                try:
                    number = call.todo.pop()
                except IndexError:
                    call.idle.set()
                    time.sleep(POLL_S)
                else:
                    call.results[number] = function(call.jobs[number])
        finally:
            call.todo.clear()
            call.idle.set()
        for thread in threads:
            thread.join()
        return [call.results[number] for number in range(len(call.jobs))]

    def _workers(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return found

    def _places(self) -> list[str]:
        """The address of each helper, once for each job that it can do at a time."""
        there = self._workers()
        if new := [address for address in there if address not in self._processors]:
            facts = self._client.run(machine.describe, workers=new, on_error="ignore")
            self._processors |= {address: str(each["name"]) for address, each in facts.items()}
        same = self._processors.get(self._own)
        places = []
        for address, known in there.items():
            offers = known.get("resources") or {}
            count = min(int(offers.get(name, 0) // amount) for name, amount in self._needs.items())
            if same is not None and self._processors.get(address) == same:
                places += [address] * (count - (address == self._own))
        return places

    def _help(self, call: _Call, address: str) -> None:
        """Let one helper do jobs until none is left, or it fails."""
        function: Future | None = None
        while True:
            try:
                number = call.todo.popleft()
            except IndexError:
                return
            try:
                function = function or self._sent(call.function, address)
                answer = self._asked(call, number, function, address)
                if answer is None:
                    return
                call.results[number] = pickle.loads(answer)
            except (
                OSError,
                ValueError,
                RuntimeError,
            ):  # the helper was lost; what a job raises is raised by the node itself
                return
            finally:
                if number not in call.results:
                    call.todo.append(number)

    def _sent(self, packed: bytes, address: str) -> Future:
        return self._client.scatter(packed, workers=[address], hash=False)

    def _asked(self, call: _Call, number: int, function: Future, address: str) -> bytes | None:
        """What a helper answers; None: it is lost, has not begun when all else is done, or it failed."""
        name = f"job-{number}-{secrets.token_hex(6)}"
        future = self._client.submit(
            assist,
            function,
            self._sent(pickle.dumps(call.jobs[number]), address),
            self._sweep,
            int(self._needs.get(CORES, 1)),
            self._topic,
            name,
            key=name,
            pure=False,
            resources=self._needs,
            workers=[address],
            priority=PRIORITY,
        )
        looked = time.monotonic()
        while not future.done():
            time.sleep(POLL_S)
            left = call.idle.is_set() and name not in self._begun
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                left = left or address not in self._workers()
            if left:
                future.cancel()
                return None
        answer: bytes | None = future.result() if future.status == "finished" else None
        return answer


class _Call:
    """Jobs that are being done."""

    def __init__(self, function: Callable[[Any], Any], jobs: list[Any]) -> None:
        self.function, self.jobs = pickle.dumps(function), jobs
        self.todo = deque(range(len(jobs)))
        self.results: dict[int, Any] = {}
        self.idle = threading.Event()  # set when the node that calibrates has nothing left to begin
