"""Checks before any work whether there is enough disk and memory for an export."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.export.plan import Plan
from gemma_edge.export.targets import GIB
from gemma_edge.files import nearest_existing
from gemma_edge.memory import memory_mib, room_bytes
from gemma_edge.model.checkpoint import Weights
from gemma_edge.quantize.calibration import cache, layerwise
from gemma_edge.quantize.recipe import Recipe


def disk_bytes(plans: Iterable[Plan]) -> int:
    """Bytes needed while exporting to several backends at once: each one's weights, and everything else only once."""
    every = list(plans)
    return max(plan.export_disk_bytes - plan.weights_bytes for plan in every) + sum(p.weights_bytes for p in every)


def check_disk(
    work: Path,
    plans: Iterable[Plan],
    source: Weights,
    recipe: Recipe,
    calibration: layerwise.Calibration | None,
) -> None:
    """Refuse what will not fit: the export in its folder, the calibration in its cache, and both where they share a disk.

    Args:
        work: the folder of the export.
        plans: one for each backend.
        source, recipe, calibration: what is calibrated; None: nothing is.

    Raises:
        InputError: names the folder, the bytes needed and the bytes free.
    """
    out = nearest_existing(work.absolute().parent)
    needs = [(out, disk_bytes(plans), "pass `out` on another disk")]
    if calibration is not None:
        kept = cache.calibration_folder(layerwise.key_of(source, recipe, calibration))
        need = layerwise.missing_bytes(kept, source.config, recipe, calibration)
        if need:
            needs.append((kept, need, f"set {cache.VARIABLE} to a folder on another disk"))
    for folder, _, hint in needs:
        disk = folder.stat().st_dev
        need = sum(need for other, need, _ in needs if other.stat().st_dev == disk)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise InputError(
                f"no space for the export: it needs {need / GIB:.2f} GiB in {folder},"
                f" {free / GIB:.2f} GiB are free; free some, or {hint}"
            )


def check_memory(plans: Iterable[Plan]) -> None:
    """Refuse an export that needs more memory than a container's limit, `ulimit -v` or the machine allows.

    Raises:
        InputError: names the memory that is needed and the memory that is available.
    """
    room, taken = room_bytes(), int(memory_mib().get("rss", 0) * (1 << 20))
    need = max(plan.export_ram_bytes for plan in plans)
    if room is not None and need > room + taken:
        raise InputError(
            f"not enough memory for the export: it needs about {need / GIB:.2f} GiB, but this process may take"
            f" {(room + taken) / GIB:.2f} GiB; raise the limit (ulimit -v, or the container's), or use a larger machine"
        )
