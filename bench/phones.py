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
from gemma_edge.bench.choice import PHONES
from gemma_edge.bench.result import Settings
from gemma_edge.bundle.backends import ALL
from gemma_edge.bundle.entries import FileEntry, PlanEntry
from gemma_edge.bundle.manifest import MANIFEST, Manifest, confined
from gemma_edge.errors import InputError
from gemma_edge.files import sha256
from gemma_edge.progress import Progress

PACKAGE = "gemma.edge.app"
ACTIVITY = f"{PACKAGE}/.BenchmarkActivity"
RESULTS = f"/sdcard/Android/data/{PACKAGE}/files/bench"
# BUNDLES: the folder for bundles on the phone. Apps can read it, and no other program uses it.
BUNDLES = "/data/local/tmp/gemma-edge"
# BACKENDS: the backends for which the app may have an engine, in the order in which it tries them.
BACKENDS = ("executorch", "tflite", "onnx")
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


def chosen_backends(path: Path, manifest: Manifest, requested: str | None) -> list[str]:
    """The backends of a bundle that are measured; "" is the one that the app takes by itself.

    Args:
        path: the bundle.
        manifest: its manifest.
        requested: one backend, `ALL`, or None.

    Raises:
        InputError: the bundle does not hold what is requested, or nothing that the app can run.
    """
    possible = [name for name in BACKENDS if name in manifest.backends]
    found = [name for name in possible if requested in (None, ALL, name)]
    if not found:
        names, needed = ", ".join(manifest.backends), requested if requested in BACKENDS else " or ".join(BACKENDS)
        raise InputError(f"{path} holds no {needed} backend, only {names}; export with `backend`", field="backend")
    return found if requested else [""]


def check(phone: Device, known: Facts, plans: Sequence[PlanEntry], missing_bytes: int) -> None:
    """Refuse a bundle that a phone cannot run, before a byte is sent.

    Args:
        phone: the phone.
        known: what the phone tells about itself.
        plans: the memory that each of the backends needs; one of them must fit.
        missing_bytes: bytes of the bundle that the phone does not have yet.

    Raises:
        AdbError: the phone has another ABI, too old an Android, too little memory or storage, or not the app.
    """
    ram_bytes = min(plan.device_ram_bytes for plan in plans)
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
    """A bundle on a phone, for all its backends."""

    def __init__(self, phone: Device, path: Path, manifest: Manifest) -> None:
        """The phone is not asked anything yet."""
        self.phone, self.path, self.manifest = phone, path, manifest
        self.failure = ""  # why the bundle was not sent; "" where it was
        self.digest = sha256(path / MANIFEST)
        self.folder = f"{BUNDLES}/{self.digest[:16]}"
        self.device: dict[str, Any] = {"name": phone.serial}

    def send(self, progress: Progress) -> None:
        """Check the phone, then send the files that it does not have.

        Raises:
            AdbError: the phone cannot run the bundle, or the files could not be sent.
        """
        entry = FileEntry((self.path / MANIFEST).stat().st_size, self.digest)
        # The manifest comes last, because a folder without it is not a bundle.
        files = {**self.manifest.files, MANIFEST: entry}
        known = facts(self.phone)
        self.device = known.device
        there = sum(self.phone.size(f"{self.folder}/{name}{end}") for name in files for end in ("", ".partial"))
        total = sum(file.bytes for file in files.values())
        plans = [entry.plan for name, entry in self.manifest.backends.items() if name in BACKENDS]
        check(self.phone, known, plans, max(0, total - there))
        folders = {f"{self.folder}/{name}".rpartition("/")[0] for name in files}
        self.phone.shell(f"mkdir -p {shlex.join(sorted(folders))}")
        with progress(f"send to {self.phone.serial}", total, True) as advance:
            for name, file in files.items():
                local = self.path / MANIFEST if name == MANIFEST else confined(self.path, name)
                self.phone.send(local, f"{self.folder}/{name}", file, advance)

    def remove(self) -> None:
        """Stop the app and delete the bundle, if the phone can still be reached."""
        with suppress(AdbError):
            self.phone.shell(f"am force-stop {PACKAGE}", check=False)
            self.phone.shell(f"rm -rf {self.folder}; rmdir {BUNDLES} 2>/dev/null", check=False)


class PhoneContender:
    """A backend of a bundle on a phone: a `Contender`."""

    tool = PHONES

    def __init__(self, bundle: PhoneBundle, backend: str, *, answer_s: float) -> None:
        """A backend of "" lets the app choose; after `answer_s`, beside the minutes asked for, a measurement is given up."""
        self.bundle = bundle
        self._phone, self._backend, self._answer_s = bundle.phone, backend, answer_s
        self.model = (
            self._facts(backend) if backend else {"name": bundle.path.resolve().name, "backend": "chosen by the app"}
        )

    def device(self, settings: Settings) -> dict[str, Any]:
        """See `Contender`."""
        return self.bundle.device

    def measure(self, settings: Settings) -> dict[str, Any]:
        """See `Contender`. The app is started once.

        Raises:
            AdbError: the app cannot be started, dies, or gives no result in time.
        """
        if self.bundle.failure:
            raise AdbError(self.bundle.failure)
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
        extras = f"--es bundle {self.bundle.folder} --es result {name} --ef minutes {settings.minutes}"
        extras += f" --es backend {self._backend}" if self._backend else ""
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
        backend = str(result.model["backend"])
        if backend not in self.bundle.manifest.backends or backend != (self._backend or backend):
            asked = f" instead of {self._backend}" if self._backend else ""
            raise AdbError(
                f"{self._phone.serial}: the app measured the backend {backend!r}{asked}; install another version"
            )
        known = self._facts(backend)
        needed = read_bytes_per_token(known, self.bundle.manifest.backends[backend].cache, settings)
        model = {**result.model, **known, "read_bytes_per_token": needed}
        merged = {when: {**result.state.get(when, {}), **values} for when, values in states.items()}
        fields = {**asdict(result), "model": model, "state": merged, "device": {**result.device, **self.bundle.device}}
        for name in ("settings", "started", "failure"):
            del fields[name]
        return fields

    def _facts(self, backend: str) -> dict[str, Any]:
        return backend_facts(self.bundle.path, self.bundle.manifest, backend)


@dataclass(frozen=True)
class Request:
    """What is asked of all phones."""

    backend: str | None  # see `chosen_backends`
    answer_s: float  # see `PhoneContender`
    keep: bool  # leave the bundles on the phones


@contextmanager
def on_phones(
    phones: Sequence[Device], paths: Sequence[Path], request: Request, progress: Progress
) -> Iterator[list[PhoneContender]]:
    """Send every bundle to every phone, and remove them at the end.

    Args:
        phones: the phones.
        paths: the bundles.
        request: what is measured.
        progress: shows how far sending is.

    Yields:
        a contender for every backend of every bundle on every phone; where a bundle could not be sent, measuring fails with
        the reason.

    Raises:
        InputError: the app cannot run one of the bundles, or no bundle could be sent to any phone.
    """
    manifests = {path: Manifest.load(path) for path in paths}
    backends = {path: chosen_backends(path, manifest, request.backend) for path, manifest in manifests.items()}
    bundles = [PhoneBundle(phone, path, manifests[path]) for phone in phones for path in paths]
    try:
        for bundle in bundles:
            try:
                bundle.send(progress)
            except AdbError as error:
                bundle.failure = str(error)
                bundle.remove()
        if all(bundle.failure for bundle in bundles):
            raise InputError("; ".join(dict.fromkeys(bundle.failure for bundle in bundles)))
        every = [(bundle, name) for bundle in bundles for name in backends[bundle.path]]
        yield [PhoneContender(bundle, name, answer_s=request.answer_s) for bundle, name in every]
    finally:
        for bundle in bundles:
            if not request.keep:
                bundle.remove()
