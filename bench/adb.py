"""Talks to phones through Android's own `adb`: lists them, runs commands on them, sends files to them. phones.py measures.

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
from gemma_edge.bundle.entries import FileEntry
from gemma_edge.children import find_program
from gemma_edge.errors import InputError

# ANSWER_S: after how many seconds a phone that does not answer a short command counts as stuck.
ANSWER_S = 30.0
# BLOCK_BYTES: how many bytes of a file are sent at once.
BLOCK_BYTES = 1 << 20
# HASHED_BYTES_PER_S: how fast a phone hashes at least; any phone that runs a model is faster.
HASHED_BYTES_PER_S = 50e6

# MEANINGS: what adb or the phone prints -> what the user is told. The first match counts.
MEANINGS = (
    ("unauthorized", "it has not allowed this computer yet: unlock it and accept its question about USB debugging"),
    ("no permissions", "this computer may not use it: see the udev rules in Android's documentation, then replug it"),
    ("offline", "it is offline: replug it, or run adb reconnect"),
    ("No space left on device", "it has no space left; free some"),
    ("not found", "it is gone: was it unplugged?"),
    ("no devices", "it is gone: was it unplugged?"),
    ("error: closed", "it is gone: was it unplugged?"),
    ("protocol fault", "it is gone: was it unplugged?"),
)  # fmt: skip


class AdbError(ChildFailed):
    """A command of adb failed. The message is one line that begins with the phone's serial."""


def find_adb() -> str:
    """The path of the user's own adb, else of the adb that the `adb` extra installs.

    Raises:
        InputError: there is none.
    """
    if program := find_program("adb"):
        return program
    spec = importlib.util.find_spec("adbutils")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if program := find_program("adb", [f"{folder}/binaries"]):
            return program
    raise InputError(
        "`device` needs adb, which is not on the PATH",
        field="device",
        hint="install Android's platform-tools, or pip install 'gemma-edge[adb]'",
    )


@dataclass(frozen=True)
class ListedPhone:
    """A line of `adb devices`."""

    serial: str
    state: str  # "device" for a phone that can be used; else unauthorized, offline, ...


def list_phones(program: str) -> list[ListedPhone]:
    """Every phone that adb sees, in any state.

    Raises:
        InputError: adb itself fails.
    """
    try:
        done = subprocess.run([program, "devices"], capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        printed = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        reason = printed[-1] if printed else error
        raise InputError(f"`adb devices` fails ({program}): {reason}", hint="try adb kill-server") from None
    lines = (line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return [ListedPhone(serial, state.strip()) for serial, state in lines]


class Device:
    """One phone."""

    def __init__(self, program: str, serial: str) -> None:
        self.serial = serial
        self._adb = [program, "-s", serial]
        self._program = program

    def shell(self, command: str, *, check: bool = True, timeout_s: float = ANSWER_S) -> str:
        """Run a command on the phone and return what it printed, without spaces around.

        Args:
            command: for the phone's shell.
            check: whether a status other than 0 is a failure. A phone that is gone is one in any case.
            timeout_s: after how many seconds the phone counts as stuck.

        Raises:
            AdbError: the command failed, or the phone is gone or stuck.
        """
        # The status is printed last. Where it is missing the connection broke, which adb's own status does not always show.
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

    def failure(self, printed: str, command: str) -> AdbError:
        """The error to raise for a command that failed.

        Args:
            printed: what adb or the phone printed; empty often means that the phone was unplugged meanwhile.
            command: named where the phone is still there and nothing in MEANINGS matches.
        """
        for mark, meaning in MEANINGS:
            if mark in printed and (mark != "not found" or printed.startswith(("error: ", "adb: ", "adb.exe: "))):
                return AdbError(f"{self.serial}: {meaning}")
        if self.serial not in {phone.serial for phone in list_phones(self._program) if phone.state == "device"}:
            return AdbError(f"{self.serial}: it is gone: was it unplugged?")
        last = printed.splitlines()[-1] if printed else "no reason given"
        return AdbError(f"{self.serial}: {command.split()[0]!r} failed: {last}")

    def size(self, path: str) -> int:
        """How many bytes a file on the phone has; 0 where there is none."""
        size = self.shell(f"stat -c %s {shlex.quote(path)} 2>/dev/null", check=False)
        return int(size) if size.isdigit() else 0

    def has(self, path: str, entry: FileEntry) -> bool:
        """Whether a file on the phone has the size and the hash of a manifest's entry. The phone computes the hash."""
        if self.size(path) != entry.bytes:
            return False
        limit_s = ANSWER_S + entry.bytes / HASHED_BYTES_PER_S
        return self.shell(f"sha256sum {shlex.quote(path)}", timeout_s=limit_s).split()[0] == entry.sha256

    def send(self, local: Path, remote: str, entry: FileEntry, progress: Callable[[int], None]) -> None:
        """Send a file unless the phone has it. What an earlier attempt has sent is kept, and the rest is sent.

        Args:
            local, remote: the paths here and on the phone.
            entry: size and hash of the file.
            progress: called with the bytes that are there; a negative number takes them back.

        Raises:
            AdbError: the file could not be sent, or arrived changed twice.
        """
        if self.has(remote, entry):
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
            if self.has(partial, entry):
                self.shell(f"mv {shlex.quote(partial)} {shlex.quote(remote)}")
                return
            self.shell(f"rm -f {shlex.quote(partial)}")
            progress(-entry.bytes)
        raise AdbError(f"{self.serial}: {local.name} arrived changed, twice; try another cable or port")

    def _append(self, local: Path, remote: str, start: int, progress: Callable[[int], None]) -> None:
        """Send the bytes of a file from `start` on, and append them to a file on the phone."""
        words = [*self._adb, "shell", "-T", f"cat >> {shlex.quote(remote)}"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdin is not None and process.stdout is not None
        watchdog = _Watchdog(process)
        try:
            with local.open("rb") as file, process.stdin as pipe:
                file.seek(start)
                while block := file.read(BLOCK_BYTES):
                    pipe.write(block)
                    watchdog.fed()
                    progress(len(block))
        except BrokenPipeError:  # the process has ended, and its status and output say why
            pass
        finally:
            watchdog.fed()
            printed = process.stdout.read().decode(errors="replace").strip()
            process.stdout.close()
            process.wait()
            watchdog.cancel()
        if watchdog.bitten:
            raise AdbError(f"{self.serial}: it accepted no byte of {local.name} for {ANSWER_S:.0f} s; replug it")
        if process.returncode:
            raise self.failure(printed, f"sending {local.name}")


class _Watchdog:
    """Kills a process that makes no progress for ANSWER_S seconds. `bitten` tells whether it has."""

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
        """The process has made progress: wait anew."""
        self._timer.cancel()
        self._start()

    def cancel(self) -> None:
        """The process has ended: stop waiting."""
        self._timer.cancel()


def choose(program: str, serial: str | None, *, every: bool, note: Callable[[str], None]) -> list[Device]:
    """The phones to measure. A phone that is connected in several ways counts once.

    Args:
        program: adb's path.
        serial: the phone to take; None takes the only one that is connected.
        every: take every phone that is ready.
        note: called with one line for each phone that is left out.

    Raises:
        InputError: no phone is connected, or none with this serial, or several and none was named.
    """
    phones = list_phones(program)
    if serial is not None and serial not in {phone.serial for phone in phones}:
        seen = ", ".join(f"{phone.serial} ({phone.state})" for phone in phones) or "none"
        raise InputError(
            f"`device` adb:{serial}: no such phone; adb sees {seen}", field="device", value=f"adb:{serial}"
        )
    phones = [phone for phone in phones if serial in (None, phone.serial)]
    if not phones:
        raise InputError(
            "no phone is connected: plug one in, switch USB debugging on in its developer options, see adb devices"
        )
    ready = [Device(program, phone.serial) for phone in phones if phone.state == "device"]
    reasons = [
        str(Device(program, phone.serial).failure(phone.state, "adb")) for phone in phones if phone.state != "device"
    ]
    if not ready:
        raise InputError("; ".join(reasons))
    for reason in reasons:
        note(f"left out: {reason}")
    ready = _without_twins(ready)
    if len(ready) > 1 and not every:
        names = ", ".join(device.serial for device in ready)
        raise InputError(f"{len(ready)} phones are connected: {names}; give `device` adb:SERIAL, or `all_devices`")
    return ready


def _without_twins(devices: Sequence[Device]) -> list[Device]:
    """Each phone once, told apart by its own serial number: adb lists a phone by cable and by Wi-Fi as two."""
    own: dict[str, Device] = {}
    for device in devices:
        own.setdefault(device.shell("getprop ro.serialno", check=False) or device.serial, device)
    return list(own.values())
