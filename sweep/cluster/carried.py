"""Results that travel with the work, for nodes that do not see the driver's store: packed, sent through Dask, and unpacked."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gemma_edge import user_cache
from gemma_edge.bundle.staging import staged
from gemma_edge.sweep.cluster.store import CACHED, UNIT, Record, Store
from gemma_edge.sweep.cluster.work import run_unit
from gemma_edge.sweep.units import Unit


def pack(folder: Path) -> bytes:
    """The files of a finished unit."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname=".")
    return packed.getvalue()


def unpack(packed: bytes, place: Path) -> None:
    """Put the files of a finished unit in their place, unless they are there."""
    if UNIT.is_one(place):
        return
    with staged(place, force=False, kind=UNIT) as work, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(work / UNIT.folder, filter="data")


def run_carried(unit: Unit, store: Store, sweep: str, parcels: Mapping[str, bytes]) -> tuple[Record, bytes]:
    """`run_unit` on a node that does not see the store.

    Args:
        unit: what to do.
        store: the driver's, of which only the kind is taken: here its folder is one in the user's cache.
        sweep: see `run_unit`.
        parcels: kind -> the packed result of a unit that this one needs.

    Returns:
        the record, and the packed result.
    """
    own = replace(store, root=user_cache.folder(CACHED, "carried"))
    for kind, other in unit.after.items():
        unpack(parcels[kind], own.place(other))
    record = run_unit(unit, own, sweep)
    return record, pack(own.place(unit))
