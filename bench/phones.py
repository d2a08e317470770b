"""gemma-bench on phones: checks before anything is sent, the bundle sent once, the app's benchmark run, its JSON read back.

The app's side is described in docs/benchmarking.md. adb.py talks to the phone.
"""

from __future__ import annotations

import re
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
from gemma_edge.bundle.manifest import MANIFEST, FileEntry, Manifest, confined
from gemma_edge.errors import InputError
from gemma_edge.progress import Progress

PACKAGE = "gemma.edge.app"
ACTIVITY = f"{PACKAGE}/.BenchmarkActivity"
RESULTS = f"/sdcard/Android/data/{PACKAGE}/files/bench"
BUNDLES = "/data/local/tmp/gemma-edge"  # readable by apps, and nobody else's
BACKEND = "onnx"  # what the app runs
ABIS = ("arm64-v8a", "x86_64")
OLDEST_SDK = 26
MIB = 1 << 20
SPARE_BYTES = 64 * MIB  # to leave on the phone
POLL_S = 1.0


@dataclass(frozen=True)
class Facts:
    """What is asked of a phone before anything is sent."""

    device: dict[str, Any]  # for the result
    sdk: int
    abis: tuple[str, ...]
    ram_bytes: int
    free_bytes: int


def facts(phone: Device) -> Facts:
    """Ask."""
    names = ("ro.product.manufacturer", "ro.product.model", "ro.soc.manufacturer", "ro.soc.model", "ro.board.platform",
             "ro.build.version.release", "ro.build.version.sdk", "ro.product.cpu.abilist", "ro.product.cpu.abi")  # fmt: skip
    values = phone.shell("; ".join(f'echo "$(getprop {name})"' for name in names)).splitlines()
    values += [""] * (len(names) - len(values))
    maker, model, soc_maker, soc, platform, release, sdk, abilist, abi = (value.strip() for value in values)
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
    """What changes while one measures; what the phone does not tell is left out."""
    battery = phone.shell("dumpsys battery", check=False)
    thermal = phone.shell("dumpsys thermalservice", check=False)
    clocks = phone.shell("cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq 2>/dev/null", check=False)
    found: dict[str, Any] = {}
    for name, pattern, text, scale in (
        ("battery_percent", r"^\s*level: (\d+)", battery, 1),
        ("battery_temperature_c", r"^\s*temperature: (-?\d+)", battery, 10),
        ("thermal_status", r"Thermal Status: (\d)", thermal, 1),
    ):
        if match := re.search(pattern, text, re.MULTILINE):
            found[name] = int(match[1]) / scale if scale > 1 else int(match[1])
    if "powered:" in battery:
        found["plugged"] = bool(re.search(r"powered: true", battery))
    if numbers := [int(word) for word in clocks.split() if word.isdigit()]:
        found["cpu_mhz"] = max(numbers) / 1000
    return found


def check(phone: Device, known: Facts, manifest: Manifest, missing_bytes: int) -> None:
    """Refuse what cannot run, before a byte is sent.

    Raises:
        AdbError: ABI, Android version, memory, storage or the app.
    """
    need_bytes = manifest.backends[BACKEND].plan.device_ram_bytes
    send_bytes = missing_bytes + SPARE_BYTES
    ram, needed, free, wanted = (
        f"{count / MIB:.0f} MiB" for count in (known.ram_bytes, need_bytes, known.free_bytes, send_bytes)
    )
    abis = ", ".join(known.abis) or "unknown"
    refusals = (
        (not set(known.abis) & set(ABIS), f"its ABI is {abis}, the app has {' and '.join(ABIS)}"),
        (known.sdk < OLDEST_SDK, f"its SDK is {known.sdk}, the app needs {OLDEST_SDK} (Android 8) or newer"),
        (
            known.ram_bytes < need_bytes,
            f"it has {ram} of memory, the bundle's plan says {needed}; export with a smaller --context",
        ),
        (known.free_bytes < send_bytes, f"{free} are free in /data/local/tmp, {wanted} are needed; free some"),
    )
    for refused, why in refusals:
        if refused:
            raise AdbError(f"{phone.serial}: {why}")
    if not phone.shell(f"pm path {PACKAGE}", check=False).startswith("package:"):
        raise AdbError(f"{phone.serial}: the app {PACKAGE} is not installed: adb -s {phone.serial} install -g APK")


class PhoneBundle:
    """A bundle on a phone: a `Contender` of bench.py."""

    tool = "gemma-edge-android"

    def __init__(self, phone: Device, path: Path, manifest: Manifest, *, answer_s: float) -> None:
        """Nothing is asked yet.

        Args:
            answer_s: a measurement that takes longer, --minutes aside, is given up.
        """
        self.model = backend_facts(path, manifest, BACKEND)
        self.failure = ""  # why it was never sent
        self._phone, self._path, self._manifest, self._answer_s = phone, path, manifest, answer_s
        self._folder = f"{BUNDLES}/{self.model['manifest_sha256'][:16]}"
        self._device: dict[str, Any] = {"name": phone.serial}

    def send(self, progress: Progress) -> None:
        """Check the phone, then bring it what it does not have.

        Raises:
            AdbError: why not.
        """
        entry = FileEntry((self._path / MANIFEST).stat().st_size, str(self.model["manifest_sha256"]))
        # the manifest last: a folder without it is no bundle
        files = {**self._manifest.files, MANIFEST: entry}
        known = facts(self._phone)
        self._device = known.device
        there = sum(self._phone.size(f"{self._folder}/{name}{end}") for name in files for end in ("", ".partial"))
        total = sum(file.bytes for file in files.values())
        check(self._phone, known, self._manifest, max(0, total - there))
        folders = {f"{self._folder}/{name}".rpartition("/")[0] for name in files}
        self._phone.shell(f"mkdir -p {' '.join(sorted(folders))}")
        with progress(f"send to {self._phone.serial}", total, True) as advance:
            for name, file in files.items():
                local = self._path / MANIFEST if name == MANIFEST else confined(self._path, name)
                self._phone.send(local, f"{self._folder}/{name}", file, advance)

    def remove(self) -> None:
        """Leave nothing on the phone, as far as it can still be reached."""
        with suppress(AdbError):
            self._phone.shell(f"am force-stop {PACKAGE}", check=False)
            self._phone.shell(f"rm -rf {self._folder}; rmdir {BUNDLES} 2>/dev/null", check=False)

    def device(self, settings: Settings) -> dict[str, Any]:
        """See Contender."""
        return self._device

    def measure(self, settings: Settings) -> dict[str, Any]:
        """See Contender: one start of the app.

        Raises:
            AdbError: it cannot be started, dies, or gives no result in time.
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
        said = self._phone.shell(f"am start -W -n {ACTIVITY} {extras} 2>&1", check=False, timeout_s=120)
        if errors := [line for line in said.splitlines() if line.startswith("Error")]:
            raise AdbError(f"{self._phone.serial}: the app cannot be started: {errors[-1]}")

    def _wait(self, result: str, limit_s: float) -> str:
        until = time.monotonic() + limit_s
        gone = 0
        while time.monotonic() < until:
            # one call: a result that comes between two would be missed
            alive = self._phone.shell(f"pidof {PACKAGE}", check=False)
            if text := self._phone.shell(f"cat {result} 2>/dev/null", check=False, timeout_s=120):
                return text
            gone = 0 if alive else gone + 1
            if gone > 1:
                raise AdbError(f"{self._phone.serial}: {self._why_it_died()}")
            time.sleep(POLL_S)
        raise AdbError(
            f"{self._phone.serial}: no result after {limit_s:.0f} s; ask for less, or allow more with --timeout"
        )

    def _why_it_died(self) -> str:
        """By Android's own record of it, from Android 11 on."""
        said = self._phone.shell(f"dumpsys activity exit-info {PACKAGE}", check=False)
        match = re.search(r"reason=\d+ \((.+?)\)", said)
        if match is None:
            return f"the app died without a result; see adb -s {self._phone.serial} logcat"
        if match[1] == "LOW MEMORY" or match[1] == "LOW_MEMORY":
            return "the phone killed the app for its memory; close other apps, or export with a smaller --context"
        return f"the app died without a result: {match[1]}; see adb -s {self._phone.serial} logcat"

    def _fields(self, text: str, states: dict[str, dict[str, Any]], settings: Settings) -> dict[str, Any]:
        """Of the app's own result; what this side knows better, or the app does not tell, is added."""
        try:
            found = bench_result.read(text, f"{self._phone.serial}: the app's result")[0]
        except InputError as error:
            raise AdbError(str(error)) from None
        if found.failure:
            raise AdbError(f"{self._phone.serial}: {found.failure}")
        needed = read_bytes_per_token(self.model, self._manifest.backends[BACKEND].cache, settings)
        model = {**found.model, **self.model, "read_bytes_per_token": needed}
        merged = {when: {**found.state.get(when, {}), **values} for when, values in states.items()}
        fields = {**asdict(found), "model": model, "state": merged, "device": {**found.device, **self._device}}
        for name in ("settings", "started", "failure"):
            del fields[name]
        return fields


@contextmanager
def on_phones(
    phones: Sequence[Device], paths: Sequence[Path], progress: Progress, *, answer_s: float, keep: bool
) -> Iterator[list[PhoneBundle]]:
    """Every bundle on every phone, sent; removed again at the end, unless `keep`.

    Raises:
        InputError: a bundle that the app cannot run, or no phone on which any could be sent.
    """
    found = []
    for phone in phones:
        for path in paths:
            manifest = Manifest.load(path)
            if BACKEND not in manifest.backends:
                held = ", ".join(manifest.backends)
                raise InputError(f"{path} holds no {BACKEND!r} backend, which is what the app runs, only {held}")
            found.append(PhoneBundle(phone, path, manifest, answer_s=answer_s))
    try:
        for one in found:
            try:
                one.send(progress)
            except AdbError as error:
                one.failure = str(error)
                one.remove()
        if all(one.failure for one in found):
            raise InputError("; ".join(dict.fromkeys(one.failure for one in found)))
        yield found
    finally:
        for one in found:
            if not keep:
                one.remove()
