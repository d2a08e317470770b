"""Phones for tests: Android's real adbd, real adb, and stand-ins for what only Android has (tests/support/phone/system).

Each phone has a network of its own, so that the machine's ports and other tests do not matter. A small `adb` script in front of
the real one enters the network of the phone that is named. A thread of the test plays the app: see `App`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.bench import phones
from gemma_edge.bench.adb import find_adb
from gemma_edge.errors import InputError
from support.checkpoints import ROOT

# PATIENCE_S: how long to wait for what usually takes a moment, because the machine may be busy.
PATIENCE_S = 120
PHONE_ROOT = ROOT / "out" / "phone"
PROPERTIES = {
    "ro.product.manufacturer": "Example",
    "ro.product.model": "Phone 1",
    "ro.soc.manufacturer": "Soc",
    "ro.soc.model": "SM1",
    "ro.build.version.release": "15",
    "ro.build.version.sdk": "35",
    "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a",
}


@lru_cache
def missing() -> str:
    """The name of what this machine lacks; "" where it lacks nothing."""
    if not (PHONE_ROOT / "usr/lib/android-sdk/platform-tools/adbd").is_file():
        return "no adbd: make phone"
    try:
        find_adb()
    except InputError:
        return "no adb: pip install adbutils"
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"no {program} of util-linux"
    allowed = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "true"])
    return "" if allowed.returncode == 0 else "this system allows no namespaces"


@pytest.fixture
def needs_phone() -> None:
    if reason := missing():
        pytest.skip(reason)


KOTLIN = ROOT / "android_demo"
MAVEN = Path.home() / ".m2" / "repository"  # before HOME is another one
JARS = {  # of the modules' pom.xml: property of the version -> jar
    "kotlin.version": "org/jetbrains/kotlin/kotlin-stdlib/{0}/kotlin-stdlib-{0}.jar",
    "coroutines.version": "org/jetbrains/kotlinx/kotlinx-coroutines-core-jvm/{0}/kotlinx-coroutines-core-jvm-{0}.jar",
    "onnxruntime.version": "com/microsoft/onnxruntime/onnxruntime/{0}/onnxruntime-{0}.jar",
}


def kotlin_classpath() -> list[Path]:
    """The app's library, compiled, and what it needs on a JVM. Some of the paths may not exist."""
    pom = (KOTLIN / "pom.xml").read_text(encoding="utf-8")
    versions = {name: re.search(f"<{name}>(.*?)</{name}>", pom) for name in JARS}
    jars = (MAVEN / JARS[name].format(version[1]) for name, version in versions.items() if version)
    return [*(KOTLIN / module / "target" / "classes" for module in ("gemma", "gemma-onnx")), *jars]


class Phone:
    """One adbd. `files` is its root folder as this machine sees it."""

    def __init__(self, serial: str, *, disk: str = "200m") -> None:
        space = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        script = ROOT / "tests" / "support" / "phone" / "start.sh"
        self.serial = serial
        self._unshare = subprocess.Popen(
            [*space, "sh", script, PHONE_ROOT, disk], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.pid = self._child()
        self.files = Path(f"/proc/{self.pid}/root")
        self._wait_until_it_runs()
        self.set_properties(**{"ro.serialno": f"own-{serial}"})

    def _child(self) -> int:
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if text := children.read_text().split():
                return int(text[0])
            time.sleep(0.02)
        raise AssertionError("unshare started nothing")

    def _wait_until_it_runs(self) -> None:
        """Wait until the child has made its folders and become adbd."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if Path(f"/proc/{self.pid}/cmdline").read_text().startswith("/usr/lib/android-sdk"):
                return
            time.sleep(0.02)
        raise AssertionError("adbd did not start")

    def set_properties(self, **changes: str) -> None:
        lines = (f"{name}={value}\n" for name, value in {**PROPERTIES, **changes}.items())
        (self.files / "data/app/properties").write_text("".join(lines))

    def left(self) -> list[str]:
        """The files on the phone that are not its own."""
        folders = (self.files / "data/local/tmp", self.files / "sdcard")
        return sorted(
            str(path.relative_to(self.files)) for folder in folders for path in folder.rglob("*") if path.is_file()
        )

    def unplug(self) -> None:
        """adbd dies, and every connection with it."""
        os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()

    def stop(self) -> None:
        if self._unshare.poll() is None:
            self._unshare.kill()
            self._unshare.wait()


class Adb:
    """An `adb` on the PATH that sees the phones given to it, each in its own network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = find_adb()
        self._folder = folder
        self.phones: list[Phone] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        self.extra = folder / "extra-devices"  # further lines of `adb devices`
        self.extra.write_text("")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("HOME", str(folder))  # adb keeps its key there

    def plug_in(self, phone: Phone) -> None:
        """Connect a phone, and write the script anew."""
        self.phones.append(phone)
        inside = {
            phone.serial: f"nsenter -t {phone.pid} -U -n --preserve-credentials {self._real}" for phone in self.phones
        }
        self._serve(phone)
        ours = inside[phone.serial].split()
        deadline = time.monotonic() + 30
        while subprocess.run([*ours, "connect", "127.0.0.1:5555"], capture_output=True).returncode:
            assert time.monotonic() < deadline, "adbd does not listen"
            time.sleep(0.1)
        # at first it is listed as offline
        waiting = [*ours, "-s", "127.0.0.1:5555", "wait-for-device"]
        subprocess.run(waiting, check=True, capture_output=True, timeout=PATIENCE_S)
        listings = "".join(
            f"{command} devices | grep '^127.0.0.1:5555' | sed 's/^127.0.0.1:5555/{serial}/'\n"
            for serial, command in inside.items()
        )
        cases = "".join(f'  {serial}) exec {command} -s 127.0.0.1:5555 "$@" ;;\n' for serial, command in inside.items())
        script = (
            f"#!/bin/sh\nif [ \"$1\" = devices ]; then\necho 'List of devices attached'\n{listings}cat {self.extra}\nexit 0\nfi\n"
            f'serial=$2; shift 2\ncase "$serial" in\n{cases}'
            "  *) echo \"error: device '$serial' not found\" >&2; exit 1 ;;\nesac\n"
        )
        (self._folder / "bin").mkdir(exist_ok=True)
        (self._folder / "bin" / "adb").write_text(script)
        (self._folder / "bin" / "adb").chmod(0o755)

    def _serve(self, phone: Phone) -> None:
        """Start adb's server as a child: one that adb starts by itself would outlive an unplugged phone, and the test."""
        command = [
            "nsenter",
            "-t",
            str(phone.pid),
            "-U",
            "-n",
            "--preserve-credentials",
            self._real,
            "server",
            "nodaemon",
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._servers.append(server)
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and server.poll() is None:
            # port 5037, listening, in its own network
            if re.search(r":13AD [0-9A-F:]+ 0A ", Path(f"/proc/{server.pid}/net/tcp").read_text()):
                return
            time.sleep(0.02)
        raise AssertionError("adb's server did not start")

    def stop(self) -> None:
        for server in self._servers:
            server.kill()
            server.wait()
        for phone in self.phones:
            phone.stop()


class App(threading.Thread):
    """The app on a phone: calls `play` for each `am start`, with the extras of the command."""

    def __init__(self, phone: Phone, play: Callable[[Phone, dict[str, str]], None]) -> None:
        super().__init__(daemon=True)
        self._phone, self._play = phone, play
        self.started: list[dict[str, str]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        request = self._phone.files / "data/app/request"
        while not self._ended.wait(0.05):
            try:
                words = request.read_text().splitlines()
                request.unlink()
            except OSError:
                continue
            extras = {
                name: value
                for kind, name, value in zip(words, words[1:], words[2:], strict=False)
                if kind.startswith("--e")
            }
            self.started.append(extras)
            self._play(self._phone, extras)

    def stop(self) -> None:
        self._ended.set()
        self.join()


@contextmanager
def app(phone: Phone, play: Callable[[Phone, dict[str, str]], None]) -> Iterator[App]:
    """While the block runs, the app answers."""
    thread = App(phone, play)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def results_file(phone: Phone, extras: dict[str, str]) -> Path:
    folder = phone.files / phones.RESULTS.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / extras["result"]


def answer(phone: Phone, extras: dict[str, str], **changes: Any) -> None:
    """The app's file, with made-up times."""
    repeat, decode = int(extras["repeat"]), int(extras["decode"])
    settings = {name: int(extras[name]) for name in ("threads", "prefill", "decode", "repeat", "warmup")}
    result = {
        "tool": "gemma-edge-android",
        "started": "2026-01-01T00:00:00+00:00",
        "model": {"name": "x", "backend": extras.get("backend", "onnx"), "context": 10},
        "settings": settings,
        "device": {"name": "the app's", "read_gb_per_s": 20.0},
        "load": {"warm_s": 0.5},
        "prefill_s": [0.1] * repeat,
        "ttft_s": [0.11] * repeat,
        "decode_s": [0.05 * decode] * repeat,
        "decode_ms": [[50.0] * decode] * repeat,
        "decode_at_s": [1.0 + 10 * number for number in range(repeat)],
        "memory": {"end_mib": 100.0, "peak_mib": 120.0, "samples": [[0.0, 1.0], [1.0, 100.0]]},
        "state": {"before": {"thermal_headroom": 0.4}, "after": {"thermal_headroom": 0.6}},
        **changes,
    }
    file = results_file(phone, extras)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps({"schema_version": 1, "results": [result]}))
    partial.rename(file)
