"""Bundles measured on phones: the phone is checked, the bundle is sent, the app runs the benchmark, its JSON is read back.

docs/measure/benchmarking.md describes the app's side. adb.py talks to the phone.
"""

from __future__ import annotations

import re
import shlex
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.bench import result as bench_result
from gemma_edge.bench.adb import AdbError, Device
from gemma_edge.bench.bench import backend_facts, read_bytes_per_token
from gemma_edge.bench.result import Settings
from gemma_edge.bundle.entries import FileEntry
from gemma_edge.bundle.manifest import MANIFEST, Manifest, confined
from gemma_edge.errors import InputError
from gemma_edge.progress import Progress

PACKAGE = "gemma.edge.app"
ACTIVITY = f"{PACKAGE}/.BenchmarkActivity"
RESULTS = f"/sdcard/Android/data/{PACKAGE}/files/bench"
# BUNDLES: the folder for bundles on the phone. Apps can read it, and no other program uses it.
BUNDLES = "/data/local/tmp/gemma-edge"
# BACKEND: the backend that the app runs.
BACKEND = "onnx"
# ABIS, MIN_SDK: the ABIs and the oldest Android version that the app is built for.
ABIS = ("arm64-v8a", "x86_64")
MIN_SDK = 26
MIB = 1 << 20
# SPARE_BYTES: how much storage must stay free on the phone.
SPARE_BYTES = 64 * MIB
# POLL_S: how often the phone is asked whether the result is there.
POLL_S = 1.0
# END_OF_VALUE: the line that a phone prints after each property.
END_OF_VALUE = "--end-of-value--"


@dataclass(frozen=True)
class Facts:
    """What a phone tells about itself before anything is sent."""

    device: dict[str, Any]  # `Result.device`
    sdk: int
    abis: tuple[str, ...]
    ram_bytes: int
    free_bytes: int


def facts(phone: Device) -> Facts:
    """Ask a phone about itself.

    Raises:
        AdbError: the phone is gone or stuck.
    """
    names = ("ro.product.manufacturer", "ro.product.model", "ro.soc.manufacturer", "ro.soc.model", "ro.board.platform",
             "ro.build.version.release", "ro.build.version.sdk", "ro.product.cpu.abilist", "ro.product.cpu.abi")  # fmt: skip
    answer = phone.shell("; ".join(f"getprop {name}; echo {END_OF_VALUE}" for name in names))
    # a maker may write anything into a property, line ends and control characters included
    values = ["".join(filter(str.isprintable, " ".join(value.split()))) for value in answer.split(END_OF_VALUE)]
    values += [""] * (len(names) - len(values))
    maker, model, soc_maker, soc, platform, release, sdk, abilist, abi = values[: len(names)]
    abis = tuple(filter(None, (abilist or abi).split(",")))
    memory = re.search(r"MemTotal:\s+(\d+) kB", phone.shell("cat /proc/meminfo"))
    rows = phone.shell("df -k /data/local/tmp").splitlines()
    free = rows[-1].split()[-3] if len(rows) > 1 else ""
    ram_bytes = int(memory[1]) * 1024 if memory else 0
    cores = phone.shell("nproc", check=False)
    governor = phone.shell("cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null", check=False)
    device = {
        "name": f"{maker} {model}".strip() or phone.serial,
        "soc": f"{soc_maker} {soc}".strip() or platform,
        "system": f"Android {release} (SDK {sdk})",
        "abi": abis[0] if abis else "",
        "cores": int(cores) if cores.isdigit() else None,
        "ram_bytes": ram_bytes,
        "governor": governor,
    }
    known = {name: value for name, value in device.items() if value}
    return Facts(known, int(sdk) if sdk.isdigit() else 0, abis, ram_bytes, int(free) * 1024 if free.isdigit() else 0)


def state(phone: Device) -> dict[str, Any]:
    """What changes during a measurement: battery, temperature, clock. What the phone does not tell is left out."""
    battery = phone.shell("dumpsys battery", check=False)
    thermal = phone.shell("dumpsys thermalservice", check=False)
    clocks = phone.shell("cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq 2>/dev/null", check=False)
    readings: dict[str, Any] = {}
    for name, pattern, text, scale in (
        ("battery_percent", r"^\s*level: (\d+)", battery, 1),
        ("battery_temperature_c", r"^\s*temperature: (-?\d+)", battery, 10),
        ("thermal_status", r"Thermal Status: (\d)", thermal, 1),
    ):
        if match := re.search(pattern, text, re.MULTILINE):
            readings[name] = int(match[1]) / scale if scale > 1 else int(match[1])
    if "powered:" in battery:
        readings["plugged"] = bool(re.search(r"powered: true", battery))
    if numbers := [int(word) for word in clocks.split() if word.isdigit()]:
        readings["cpu_mhz"] = max(numbers) / 1000
    return readings


def check(phone: Device, known: Facts, manifest: Manifest, missing_bytes: int) -> None:
    """Refuse a bundle that a phone cannot run, before a byte is sent.

    Args:
        known: what the phone tells about itself.
        missing_bytes: bytes of the bundle that the phone does not have yet.

    Raises:
        AdbError: the phone has another ABI, too old an Android, too little memory or storage, or not the app.
    """
    ram_bytes = manifest.backends[BACKEND].plan.device_ram_bytes
    storage_bytes = missing_bytes + SPARE_BYTES
    ram, needed_ram, free, needed = (
        f"{count / MIB:.0f} MiB" for count in (known.ram_bytes, ram_bytes, known.free_bytes, storage_bytes)
    )
    abis = ", ".join(known.abis) or "unknown"
    refusals = (
        (not set(known.abis) & set(ABIS), f"its ABI is {abis}, the app is built for {' and '.join(ABIS)}"),
        (known.sdk < MIN_SDK, f"its SDK is {known.sdk}, the app needs {MIN_SDK} (Android 8) or newer"),
        (
            known.ram_bytes < ram_bytes,
            f"it has {ram} of memory, the bundle's plan says {needed_ram}; export with a smaller context",
        ),
        (known.free_bytes < storage_bytes, f"{free} are free in /data/local/tmp, {needed} are needed; free some"),
    )
    for refused, reason in refusals:
        if refused:
            raise AdbError(f"{phone.serial}: {reason}")
    if not phone.shell(f"pm path {PACKAGE}", check=False).startswith("package:"):
        raise AdbError(f"{phone.serial}: the app {PACKAGE} is not installed: adb -s {phone.serial} install -g APK")


class PhoneBundle:
    """A bundle on a phone: a `Contender`."""

    tool = "gemma-edge-android"

    def __init__(self, phone: Device, path: Path, manifest: Manifest, *, answer_s: float) -> None:
        """The phone is not asked anything yet.

        Args:
            answer_s: after how many seconds a measurement is given up, beside the minutes that it is asked to go on.
        """
        self.model = backend_facts(path, manifest, BACKEND)
        self.failure = ""  # why the bundle was not sent; "" where it was
        self._phone, self._path, self._manifest, self._answer_s = phone, path, manifest, answer_s
        self._folder = f"{BUNDLES}/{self.model['manifest_sha256'][:16]}"
        self._device: dict[str, Any] = {"name": phone.serial}

    def send(self, progress: Progress) -> None:
        """Check the phone, then send the files that it does not have.

        Raises:
            AdbError: the phone cannot run the bundle, or the files could not be sent.
        """
        entry = FileEntry((self._path / MANIFEST).stat().st_size, str(self.model["manifest_sha256"]))
        # The manifest comes last, because a folder without it is not a bundle.
        files = {**self._manifest.files, MANIFEST: entry}
        known = facts(self._phone)
        self._device = known.device
        there = sum(self._phone.size(f"{self._folder}/{name}{end}") for name in files for end in ("", ".partial"))
        total = sum(file.bytes for file in files.values())
        check(self._phone, known, self._manifest, max(0, total - there))
        folders = {f"{self._folder}/{name}".rpartition("/")[0] for name in files}
        self._phone.shell(f"mkdir -p {shlex.join(sorted(folders))}")
        with progress(f"send to {self._phone.serial}", total, True) as advance:
            for name, file in files.items():
                local = self._path / MANIFEST if name == MANIFEST else confined(self._path, name)
                self._phone.send(local, f"{self._folder}/{name}", file, advance)

    def remove(self) -> None:
        """Stop the app and delete the bundle, if the phone can still be reached."""
        with suppress(AdbError):
            self._phone.shell(f"am force-stop {PACKAGE}", check=False)
            self._phone.shell(f"rm -rf {self._folder}; rmdir {BUNDLES} 2>/dev/null", check=False)

    def device(self, settings: Settings) -> dict[str, Any]:
        """See `Contender`."""
        return self._device

    def measure(self, settings: Settings) -> dict[str, Any]:
        """See `Contender`. The app is started once.

        Raises:
            AdbError: the app cannot be started, dies, or gives no result in time.
        """
        if self.failure:
            raise AdbError(self.failure)
        result = f"{RESULTS}/{uuid.uuid4().hex}.json"
        self._phone.shell(f"am force-stop {PACKAGE}")
        before = state(self._phone)
        try:
            self._start(settings, result.rpartition("/")[2])
            text = self._wait(result, self._answer_s + 60 * settings.minutes)
        finally:
            with suppress(AdbError):
                self._phone.shell(f"am force-stop {PACKAGE}; rm -f {result}*", check=False)
        return self._fields(text, {"before": before, "after": state(self._phone)}, settings)

    def _start(self, settings: Settings, name: str) -> None:
        extras = f"--es bundle {self._folder} --es result {name} --ef minutes {settings.minutes}"
        numbers = {key: value for key, value in asdict(settings).items() if key != "minutes"}
        extras += "".join(f" --ei {key} {value}" for key, value in numbers.items())
        printed = self._phone.shell(f"am start -W -n {ACTIVITY} {extras} 2>&1", check=False, timeout_s=120)
        if errors := [line for line in printed.splitlines() if line.startswith("Error")]:
            raise AdbError(f"{self._phone.serial}: the app cannot be started: {errors[-1]}")

    def _wait(self, result: str, limit_s: float) -> str:
        """The text of the app's result file, when it is there."""
        until = time.monotonic() + limit_s
        gone = 0
        while time.monotonic() < until:
            # First whether the app is alive, then its result: an app that has just ended has left one.
            alive = self._phone.shell(f"pidof {PACKAGE}", check=False)
            if text := self._phone.shell(f"cat {result} 2>/dev/null", check=False, timeout_s=120):
                return text
            gone = 0 if alive else gone + 1
            if gone > 1:
                raise AdbError(f"{self._phone.serial}: {self._reason_of_death()}")
            time.sleep(POLL_S)
        raise AdbError(f"{self._phone.serial}: no result after {limit_s:.0f} s; measure less, or raise the timeout")

    def _reason_of_death(self) -> str:
        """Why the app died, by Android's own record of it, which it keeps from version 11 on."""
        record = self._phone.shell(f"dumpsys activity exit-info {PACKAGE}", check=False)
        match = re.search(r"reason=\d+ \((.+?)\)", record)
        if match is None:
            return f"the app died without a result; see adb -s {self._phone.serial} logcat"
        if match[1] in ("LOW MEMORY", "LOW_MEMORY"):
            return "the phone killed the app for its memory; close other apps, or export with a smaller context"
        return f"the app died without a result: {match[1]}; see adb -s {self._phone.serial} logcat"

    def _fields(self, text: str, states: dict[str, dict[str, Any]], settings: Settings) -> dict[str, Any]:
        """The fields of the app's result, with what is known better on this side, or what the app does not tell."""
        try:
            result = bench_result.read(text, f"{self._phone.serial}: the app's result")[0]
        except InputError as error:
            raise AdbError(str(error)) from None
        if result.failure:
            raise AdbError(f"{self._phone.serial}: {result.failure}")
        needed = read_bytes_per_token(self.model, self._manifest.backends[BACKEND].cache, settings)
        model = {**result.model, **self.model, "read_bytes_per_token": needed}
        merged = {when: {**result.state.get(when, {}), **values} for when, values in states.items()}
        fields = {**asdict(result), "model": model, "state": merged, "device": {**result.device, **self._device}}
        for name in ("settings", "started", "failure"):
            del fields[name]
        return fields


@contextmanager
def on_phones(
    phones: Sequence[Device], paths: Sequence[Path], progress: Progress, *, answer_s: float, keep: bool
) -> Iterator[list[PhoneBundle]]:
    """Send every bundle to every phone, and remove them at the end.

    Args:
        phones: the phones.
        paths: the bundles.
        progress: shows how far sending is.
        answer_s: see `PhoneBundle`.
        keep: leave the bundles on the phones.

    Yields:
        a contender for every bundle on every phone; where it could not be sent, measuring it fails with the reason.

    Raises:
        InputError: the app cannot run one of the bundles, or no bundle could be sent to any phone.
    """
    contenders = []
    for phone in phones:
        for path in paths:
            manifest = Manifest.load(path)
            if BACKEND not in manifest.backends:
                names = ", ".join(manifest.backends)
                raise InputError(f"{path} holds no {BACKEND!r} backend, which is what the app runs, only {names}")
            contenders.append(PhoneBundle(phone, path, manifest, answer_s=answer_s))
    try:
        for contender in contenders:
            try:
                contender.send(progress)
            except AdbError as error:
                contender.failure = str(error)
                contender.remove()
        if all(contender.failure for contender in contenders):
            raise InputError("; ".join(dict.fromkeys(contender.failure for contender in contenders)))
        yield contenders
    finally:
        for contender in contenders:
            if not keep:
                contender.remove()
