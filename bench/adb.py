"""Phones through Android's own `adb`: which are there, commands on one, files sent to it. What is measured is phones.py's.

Every call has a time limit, and every failure is one line that says what to do.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.bench.process import ChildFailed
from gemma_edge.bundle.manifest import FileEntry
from gemma_edge.children import find_program
from gemma_edge.errors import InputError

ANSWER_S = 30.0  # a phone that does not answer a short command for so long is stuck
BLOCK = 1 << 20

# what adb or the phone prints -> what to tell; the first that fits. The error ends with what was printed where nothing fits.
SAID = (
    ("unauthorized", "it has not allowed this computer yet: unlock it and accept its question about USB debugging"),
    ("no permissions", "this computer may not use it: see the udev rules of Android's documentation, then replug it"),
    ("offline", "it is offline: replug it, or adb reconnect"),
    ("No space left on device", "it has no space left; free some"),
    ("not found", "it is gone: was it unplugged?"),
    ("no devices", "it is gone: was it unplugged?"),
    ("error: closed", "it is gone: was it unplugged?"),
    ("protocol fault", "it is gone: was it unplugged?"),
)  # fmt: skip


class AdbError(ChildFailed):
    """A phone or adb could not do what was asked; the message is one line that begins with the phone's serial."""


def find_adb() -> str:
    """The user's own adb, else the one that the `adb` extra brings.

    Raises:
        InputError: there is none.
    """
    if found := find_program("adb"):
        return found
    spec = importlib.util.find_spec("adbutils")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if found := find_program("adb", [f"{folder}/binaries"]):
            return found
    raise InputError(
        "--device needs adb, which is not on the PATH: install Android's platform-tools, or pip install 'gemma-edge[adb]'"
    )


@dataclass(frozen=True)
class Listed:
    """A line of `adb devices`."""

    serial: str
    state: str  # "device" is well


def listed(program: str) -> list[Listed]:
    """Whatever adb sees, in whatever state.

    Raises:
        InputError: adb itself fails.
    """
    try:
        done = subprocess.run([program, "devices"], capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise InputError(f"{program} devices fails: {said[-1] if said else error}; try adb kill-server") from None
    lines = (line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return [Listed(serial, state.strip()) for serial, state in lines]


class Device:
    """One phone."""

    def __init__(self, program: str, serial: str) -> None:
        self.serial = serial
        self._adb = [program, "-s", serial]
        self._program = program

    def shell(self, command: str, *, check: bool = True, timeout_s: float = ANSWER_S) -> str:
        """Run a command on the phone; what it printed, without spaces around.

        Args:
            check: False: a status other than 0 is no failure, as long as the phone itself is there.

        Raises:
            AdbError: it failed, or the phone is gone or stuck.
        """
        # without the last line the connection broke: adb's own status does not always say so
        words = [*self._adb, "shell", "-T", f"({command}); echo @$?"]
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AdbError(
                f"{self.serial}: no answer to {command.split()[0]!r} for {timeout_s:.0f} s; replug it"
            ) from None
        output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace").strip()
        output, _, status = output.rstrip().rpartition("@")
        if not status.isdigit() or (check and status != "0"):
            raise self.failure(errors or output.strip(), command)
        return output.strip()

    def failure(self, said: str, command: str) -> AdbError:
        """What to raise for a call that failed. A phone that was unplugged meanwhile often leaves adb without a word."""
        for mark, meaning in SAID:
            if mark in said and (mark != "not found" or said.startswith(("error: ", "adb: ", "adb.exe: "))):
                return AdbError(f"{self.serial}: {meaning}")
        if self.serial not in {phone.serial for phone in listed(self._program) if phone.state == "device"}:
            return AdbError(f"{self.serial}: it is gone: was it unplugged?")
        last = said.splitlines()[-1] if said else "no reason given"
        return AdbError(f"{self.serial}: {command.split()[0]!r} failed: {last}")

    def size(self, path: str) -> int:
        """Bytes of a file on the phone; 0 where there is none."""
        found = self.shell(f"stat -c %s {shlex.quote(path)} 2>/dev/null", check=False)
        return int(found) if found.isdigit() else 0

    def holds(self, path: str, entry: FileEntry) -> bool:
        """Whether the phone has a file with these bytes; it hashes them itself."""
        if self.size(path) != entry.bytes:
            return False
        # 50 MB a second: slower than any phone that runs a model
        limit_s = ANSWER_S + entry.bytes / 50e6
        return self.shell(f"sha256sum {shlex.quote(path)}", timeout_s=limit_s).split()[0] == entry.sha256

    def send(self, local: Path, remote: str, entry: FileEntry, progress: Callable[[int], None]) -> None:
        """Bring a file to the phone unless it has it; what an earlier, broken attempt brought is kept and continued.

        Raises:
            AdbError: it could not be sent, or arrived changed twice.
        """
        if self.holds(remote, entry):
            progress(entry.bytes)
            return
        partial = f"{remote}.partial"
        for _ in range(2):
            there = self.size(partial)
            if there > entry.bytes:
                self.shell(f"rm -f {shlex.quote(partial)}")
                there = 0
            progress(there)
            self._append(local, partial, there, progress)
            if self.holds(partial, entry):
                self.shell(f"mv {shlex.quote(partial)} {shlex.quote(remote)}")
                return
            self.shell(f"rm -f {shlex.quote(partial)}")
            progress(-entry.bytes)
        raise AdbError(f"{self.serial}: {local.name} arrived changed, twice; try another cable or port")

    def _append(self, local: Path, remote: str, start: int, progress: Callable[[int], None]) -> None:
        """Send the bytes of a file from `start` on to the end of one on the phone."""
        words = [*self._adb, "shell", "-T", f"cat >> {shlex.quote(remote)}"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdin is not None and process.stdout is not None
        watchdog = _Watchdog(process)
        try:
            with local.open("rb") as file, process.stdin as pipe:
                file.seek(start)
                while block := file.read(BLOCK):
                    pipe.write(block)
                    watchdog.fed()
                    progress(len(block))
        except BrokenPipeError:  # its end says why
            pass
        finally:
            watchdog.fed()
            said = process.stdout.read().decode(errors="replace").strip()
            process.stdout.close()
            process.wait()
            watchdog.cancel()
        if watchdog.bitten:
            raise AdbError(f"{self.serial}: it took nothing of {local.name} for {ANSWER_S:.0f} s; replug it")
        if process.returncode:
            raise self.failure(said, f"sending {local.name}")


class _Watchdog:
    """Kills a process that has not moved for ANSWER_S."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.bitten = False
        self._process = process
        self._timer: threading.Timer
        self._start()

    def _start(self) -> None:
        self._timer = threading.Timer(ANSWER_S, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def _bite(self) -> None:
        self.bitten = True
        self._process.kill()

    def fed(self) -> None:
        """It moved."""
        self._timer.cancel()
        self._start()

    def cancel(self) -> None:
        """It has ended."""
        self._timer.cancel()


def choose(program: str, serial: str | None, *, every: bool, note: Callable[[str], None]) -> list[Device]:
    """The phones meant by --device and --all-devices; one phone with several transports counts once.

    Args:
        serial: of one; None: the only one.
        every: all that are ready.
        note: told of each that is left out.

    Raises:
        InputError: none, not that one, or several and nobody said which.
    """
    found = listed(program)
    serials = ", ".join(f"{phone.serial} ({phone.state})" for phone in found) or "none"
    if serial is not None and serial not in {phone.serial for phone in found}:
        raise InputError(f"--device adb:{serial}: no such phone; adb sees {serials}")
    wanted = [phone for phone in found if serial in (None, phone.serial)]
    if not wanted:
        raise InputError(
            "no phone is connected: plug one in, switch USB debugging on in its developer options, see adb devices"
        )
    ready = [Device(program, phone.serial) for phone in wanted if phone.state == "device"]
    reasons = [
        str(Device(program, phone.serial).failure(phone.state, "adb")) for phone in wanted if phone.state != "device"
    ]
    if not ready:
        raise InputError("; ".join(reasons))
    for reason in reasons:
        note(f"left out: {reason}")
    ready = _without_twins(ready)
    if len(ready) > 1 and not every:
        names = ", ".join(device.serial for device in ready)
        raise InputError(f"{len(ready)} phones are connected: {names}; give --device adb:SERIAL, or --all-devices")
    return ready


def _without_twins(devices: Sequence[Device]) -> list[Device]:
    """By the phone's own serial number: the same phone may be there by cable and by Wi-Fi."""
    own: dict[str, Device] = {}
    for device in devices:
        own.setdefault(device.shell("getprop ro.serialno", check=False) or device.serial, device)
    return list(own.values())
