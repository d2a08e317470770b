"""Phones of a sweep: which of them are there, and that each is cool before it is timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from gemma_edge.bench import adb, phones
from gemma_edge.bench.adb import AdbError
from gemma_edge.errors import InputError
from gemma_edge.sweep.options import named_phones

COOL = 0  # Android's thermal status of a phone that does not throttle
POLL_S = 5.0


def connected(requested: str) -> list[str]:
    """Serial numbers of the phones that are requested and connected here.

    Raises:
        InputError: none is connected, or one of those that are named is not.
    """
    program = adb.find_adb()
    names = named_phones(requested)
    if names is None:
        return [phone.serial for phone in adb.choose(program, None, every=True, note=lambda line: None)]
    there = {phone.serial: phone.state for phone in adb.list_phones(program)}
    for name in names:
        if there.get(name) != "device":
            seen = ", ".join(f"{serial} ({state})" for serial, state in there.items()) or "none"
            raise InputError(f"`phones` {name}: no such phone; adb sees {seen}", field="phones", value=name)
    return names


def throttled(result: Mapping[str, Any]) -> bool:
    """Whether a phone throttled by the end of a measurement."""
    after = result["state"].get("after", {}).get("thermal_status")
    return after is not None and after > COOL


def cool_down(device: adb.Device, patience_s: float) -> int | None:
    """Wait until a phone does not throttle; its thermal status then, None where it does not tell.

    Raises:
        AdbError: it stays hot, or is gone.
    """
    until = time.monotonic() + patience_s
    while True:
        status = phones.state(device).get("thermal_status")
        if status is None or status <= COOL:
            return status
        if time.monotonic() >= until:
            raise AdbError(f"{device.serial}: its thermal status is still {status} after {patience_s:.0f} s")
        time.sleep(POLL_S)
