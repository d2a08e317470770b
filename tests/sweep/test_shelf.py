"""Phones in a sweep, against Android's real adbd: side by side, cool before they are timed, and one that is unplugged."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import DEMO
from support.commands import refused
from support.phones import PATIENCE_S, Adb, Phone, answer, app, missing
from support.sweeping.command import SMALL, run

from gemma_edge.bench import phones
from gemma_edge.bench.adb import AdbError, Device
from gemma_edge.sweep import shelf

needs_phones = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adb]:
    found = Adb(tmp_path, monkeypatch)
    yield found
    found.stop()


def plugged_in(adb: Adb, *serials: str) -> list[Phone]:
    made = [Phone(serial) for serial in serials]
    for phone in made:
        adb.plug_in(phone)
        phone.set_properties(**{"ro.serialno": f"own-{phone.serial}"})
    return made


@needs_phones
def test_three_phones_work_side_by_side_and_one_that_is_unplugged_does_not_stop_the_rest(
    adb: Adb, swept: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    first, second, third = plugged_in(adb, "PHONE1", "PHONE2", "PHONE3")
    together = threading.Barrier(3, timeout=PATIENCE_S)  # broken unless all three are measured at once

    def play(phone: Phone, extras: dict[str, str]) -> None:
        together.wait()
        if phone is third:
            phone.unplug()
        else:
            (phone.files / "data/app/thermal").write_text("2" if phone is second else "0")
            answer(phone, extras)

    with app(first, play), app(second, play), app(third, play):
        done = run(
            *(DEMO, "-o", tmp_path / "out", "--bits", "4", "--group-size", "32", *SMALL, "--phones", "all"),
            *("--store", swept[0] / "units", "--retries", "1", "--json"),
        )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert row["state"] == "measured"
    found = row["phones"]
    assert [found[serial]["decode_tokens_per_s"] for serial in ("PHONE1", "PHONE2")] == [pytest.approx(20.0)] * 2
    assert not found["PHONE1"]["throttled"] and found["PHONE2"]["throttled"]
    assert "PHONE3" in found["PHONE3"]["failure"] and "(2 attempts)" in found["PHONE3"]["failure"]
    assert first.left() == second.left() == []


@needs_phones
def test_a_phone_that_is_not_there(adb: Adb, tmp_path: Path) -> None:
    plugged_in(adb, "PHONE1")
    done = run(DEMO, "-o", tmp_path / "out", "--bits", "4", *SMALL, "--phones", "PHONE1,PHONE7")
    refused(done, "--phones PHONE7: no such phone; adb sees PHONE1 (device)")


def test_a_phone_is_timed_when_it_is_cool_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "POLL_S", 0.0)
    readings: list[dict[str, int]] = [{"thermal_status": 3}, {"thermal_status": 1}, {"thermal_status": 0}]
    monkeypatch.setattr(phones, "state", lambda device: readings.pop(0))
    assert shelf.cool_down(Device("adb", "P"), 60.0) == 0 and readings == []
    monkeypatch.setattr(phones, "state", lambda device: {})
    assert shelf.cool_down(Device("adb", "P"), 60.0) is None
    monkeypatch.setattr(phones, "state", lambda device: {"thermal_status": 2})
    with pytest.raises(AdbError, match="P: its thermal status is still 2"):
        shelf.cool_down(Device("adb", "P"), 0.0)
