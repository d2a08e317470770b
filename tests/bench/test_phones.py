"""`gemma-bench --device adb` against Android's real adbd: the whole way there and back, and everything that goes wrong on it.

After each failure nothing is left on the phone, and the user has one line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.phones import Adb, Phone, answer, app, kotlin_classpath, missing, results_file
from support.toys import edit_json, toy_backend, write_toy_bundle

from gemma_edge.bench import adb as adb_module
from gemma_edge.bench import phones
from gemma_edge.bench import result as bench_result
from gemma_edge.bench.bench import BundleContender
from gemma_edge.bench.cli import main
from gemma_edge.bench.result import Settings
from gemma_edge.bundle.entries import FileEntry
from gemma_edge.bundle.manifest import MANIFEST, Manifest
from gemma_edge.bundle.settings import ExecuTorchSettings, Methods, TFLiteSettings
from gemma_edge.bundle.signature import Signature
from gemma_edge.export.api import Export
from gemma_edge.files import sha256

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
FEW = ("-p", "3", "-n", "4", "-r", "2", "-t", "1")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adb]:
    monkeypatch.setattr(phones, "POLL_S", 0.1)
    found = Adb(tmp_path, monkeypatch)
    yield found
    found.stop()


@pytest.fixture
def phone(adb: Adb) -> Phone:
    one = Phone("PHONE1")
    adb.plug_in(one)
    return one


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("phones") / "toy")


Play = Callable[[Phone, dict[str, str]], None]
NUMBERS = ("threads", "prefill", "decode", "repeat", "warmup")


def received(phone: Phone, extras: dict[str, str], folder: Path) -> Path:
    """The bundle that the phone has; in a copy, because onnxruntime wants paths without /proc in them."""
    return Path(shutil.copytree(phone.files / extras["bundle"].lstrip("/"), folder / "app", dirs_exist_ok=True))


def python_runtime(folder: Path) -> Play:
    """The Python runtime in the app's place."""

    def play(phone: Phone, extras: dict[str, str]) -> None:
        bundle = received(phone, extras, folder)
        contender = BundleContender(bundle, Manifest.load(bundle), "onnx")
        found = contender.measure(Settings(**{name: int(extras[name]) for name in NUMBERS}))
        lists = ("prefill_s", "ttft_s", "decode_s", "decode_ms", "memory")
        answer(phone, extras, **{name: found[name] for name in lists})

    return play


def kotlin_library(folder: Path) -> Play:
    """The app's own library, on a JVM."""
    classpath = kotlin_classpath()
    if shutil.which("java") is None:
        pytest.skip("no java on this machine")
    if absent := [path.name for path in classpath if not path.exists()]:
        pytest.skip(f"the Kotlin library is not compiled ({', '.join(absent)} missing): make android-test")

    def play(phone: Phone, extras: dict[str, str]) -> None:
        command = ["java", "-cp", os.pathsep.join(map(str, classpath)), "gemma.edge.Benchmark"]
        command += [str(received(phone, extras, folder)), str(results_file(phone, extras))]
        numbers = (extras[name] for name in (*NUMBERS, "minutes"))
        subprocess.run([*command, *numbers], check=True, capture_output=True)

    return play


@pytest.mark.parametrize("in_the_apps_place", [python_runtime, kotlin_library])
def test_push_run_pull_report_with_real_numbers(
    in_the_apps_place: Callable[[Path], Play], phone: Phone, demo: Export, tmp_path: Path
) -> None:
    """What arrives on the phone is a whole bundle: it is opened and measured there."""
    real = in_the_apps_place(tmp_path)

    def play(phone: Phone, extras: dict[str, str]) -> None:
        (phone.files / "data/app/thermal").write_text("2")
        real(phone, extras)

    saved = tmp_path / "phone.json"
    with app(phone, play) as played:
        done = run(
            demo.bundle, "--device", "adb:PHONE1", "-p", "8,30", "-n", "5", "-r", "3", "-t", "1", "--save", saved
        )
    assert done.exit_code == 0, done.output
    assert "Example Phone 1" in done.stdout and "Android 15 (SDK 35)" in done.stdout
    results = bench_result.load([saved])
    assert [(result.settings.prefill, len(result.decode_ms)) for result in results] == [(8, 3), (30, 3)]
    for result in results:
        assert result.tool == "gemma-edge-android" and result.model["name"] == "bundle"
        assert result.model["read_bytes_per_token"] > (demo.bundle / "model.onnx.data").stat().st_size
        told = [result.device[name] for name in ("name", "soc", "abi")]
        assert told == ["Example Phone 1", "Soc SM1", "arm64-v8a"]
        assert [len(row) for row in result.decode_ms] == [5, 5, 5] and min(result.prefill_s) > 0
        assert result.decode_s == pytest.approx([sum(row) / 1e3 for row in result.decode_ms])
        assert result.memory["peak_mib"] >= result.memory["end_mib"] > 5
        known = {"battery_percent": 87, "battery_temperature_c": 30.1, "plugged": True}
        assert result.state["before"].items() >= known.items()
        assert result.state["after"]["thermal_status"] == 2
    assert results[0].state["before"]["thermal_status"] == 0
    words = [dict(extras) for extras in played.started]
    assert len({extras.pop("result") for extras in words}) == 2 and len({extras.pop("bundle") for extras in words}) == 1
    shared = {"minutes": "0.0", "threads": "1", "decode": "5", "repeat": "3", "warmup": "1"}
    assert words == [{**shared, "prefill": "8"}, {**shared, "prefill": "30"}]
    assert phone.left() == []


def several(path: Path) -> Path:
    """A bundle with the entries of three backends and the files of one, which is enough for the computer's side."""
    program = "generate.onnx"
    signatures = (Signature("decode", "decode", 1),)
    others: dict[str, Any] = {
        "executorch": ExecuTorchSettings(program, Methods("forward", "score"), "1.0.0"),
        "tflite": TFLiteSettings(program, signatures, "1.0.0"),
    }
    entries = {name: replace(toy_backend(), settings=settings) for name, settings in others.items()}
    return write_toy_bundle(path, backends={"onnx": toy_backend(), **entries})


def test_all_backends_are_measured_in_turns_and_the_fastest_is_named(phone: Phone, tmp_path: Path) -> None:
    """The app measured ONNX Runtime only."""
    seconds = {"executorch": 0.1, "tflite": 0.2}

    def play(phone: Phone, extras: dict[str, str]) -> None:
        backend = extras["backend"]
        if backend == "onnx":
            return answer(phone, extras, failure="no engine", prefill_s=[], ttft_s=[], decode_s=[], decode_ms=[])
        answer(phone, extras, decode_s=[seconds[backend]] * 2, versions={backend: "1"})

    saved = tmp_path / "saved.json"
    bundle = several(tmp_path / "several")
    with app(phone, play) as played:
        done = run(bundle, "--device", "adb", "--backend", "all", "--rounds", "2", *FEW, "--save", saved)
    assert done.exit_code == 1 and done.output.count("PHONE1: no engine") == 1, done.output
    turn = ["executorch", "tflite", "onnx"]
    assert [extras["backend"] for extras in played.started] == turn + turn
    assert len({extras["bundle"] for extras in played.started}) == 1
    line = "several: ship executorch: prompt and answer take 0.21 s and 120 MiB of memory, with tflite 0.31 s"
    assert line in " ".join(done.stdout.split())
    found = bench_result.load([saved])
    assert [(result.model["backend"], result.versions) for result in found[:2]] == [
        ("executorch", {"executorch": "1"}),
        ("tflite", {"tflite": "1"}),
    ]
    seconds["tflite"] = 0.1
    with app(phone, play):
        done = run(bundle, "--device", "adb", "--backend", "all", *FEW)
    assert "equally fast within noise; ship" in " ".join(done.stdout.split())
    assert phone.left() == []


def test_without_a_backend_the_app_chooses_and_with_one_it_obeys(phone: Phone, toy: Path, tmp_path: Path) -> None:
    bundle = several(tmp_path / "several")
    saved = tmp_path / "saved.json"
    with app(phone, lambda phone, extras: answer(phone, extras, model={"name": "x", "backend": "tflite"})) as played:
        assert run(bundle, "--device", "adb", *FEW, "--save", saved).exit_code == 0
        refused_by = run(bundle, "--device", "adb", *FEW, "--backend", "onnx")
    assert "backend" not in played.started[0] and played.started[1]["backend"] == "onnx"
    (result,) = bench_result.load([saved])
    assert result.model["backend"] == "tflite" and result.model["read_bytes_per_token"] > 0
    refused(run(toy, "--device", "adb", *FEW, "--backend", "tflite"), "holds no tflite backend, only onnx")
    assert refused_by.exit_code == 1
    assert "the app measured the backend 'tflite' instead of onnx" in " ".join(refused_by.stdout.split())


def test_a_kept_bundle_is_not_sent_again_but_checked(phone: Phone, toy: Path) -> None:
    with app(phone, answer):
        assert run(toy, "--device", "adb", *FEW, "--keep").exit_code == 0
        files = sorted(path.name for path in toy.iterdir())
        folder = phone.files / "data/local/tmp/gemma-edge"
        (bundle,) = folder.iterdir()
        assert sorted(path.name for path in bundle.iterdir()) == files
        untouched, damaged = bundle / "score.onnx", bundle / "generate.onnx"
        inode = untouched.stat().st_ino
        with damaged.open("r+b") as file:  # the size stays
            file.write(b"damage")
        assert run(toy, "--device", "adb", *FEW, "--keep").exit_code == 0
        assert untouched.stat().st_ino == inode
        assert damaged.read_bytes() == (toy / "generate.onnx").read_bytes()
        assert run(toy, "--device", "adb", *FEW).exit_code == 0
    assert phone.left() == []


def test_what_a_broken_attempt_brought_is_continued(phone: Phone, tmp_path: Path) -> None:
    source = tmp_path / "blob"
    source.write_bytes(bytes(range(256)) * 40_000)
    entry = FileEntry(source.stat().st_size, sha256(source))
    device = adb_module.Device(adb_module.find_adb(), "PHONE1")
    partial = phone.files / "data/local/tmp/blob.partial"
    for there, sent in (
        (source.read_bytes()[:7_000_000], [7_000_000, 3_240_000]),
        (b"wrong" * 100, None),
        (b"x" * 11_000_000, None),
    ):
        partial.write_bytes(there)
        steps: list[int] = []
        device.send(source, "/data/local/tmp/blob", entry, steps.append)
        arrived = phone.files / "data/local/tmp/blob"
        assert arrived.read_bytes() == source.read_bytes() and not partial.exists()
        assert sum(steps) == entry.bytes
        if sent:
            assert steps[0] == sent[0] and sum(steps[1:]) == sent[1]
        arrived.unlink()


Break = Callable[[Phone], None]


def properties(**changes: str) -> Break:
    return lambda phone: phone.set_properties(**{"ro.serialno": "x", **{f"ro.{k}": v for k, v in changes.items()}})


def file(name: str, text: str = "") -> Break:
    def write(phone: Phone) -> None:
        (phone.files / "data/app" / name).write_text(text)

    return write


def fill(phone: Phone) -> None:
    (phone.files / "data/fill").write_bytes(bytes(150 << 20))


def nothing(phone: Phone) -> None:
    """Nothing is wrong with the phone."""


BEFORE_SENDING = {
    "wrong ABI": (
        properties(**{"product.cpu.abilist": "armeabi-v7a"}),
        ["its ABI is armeabi-v7a", "arm64-v8a and x86_64"],
    ),
    "too old": (properties(**{"build.version.sdk": "24"}), ["its SDK is 24, the app needs 26"]),
    "no app": (file("absent"), ["the app gemma.edge.app is not installed", "adb -s PHONE1 install"]),
    "too little space": (fill, ["are free in /data/local/tmp", "are needed; free some"]),
}


@pytest.mark.parametrize("case", BEFORE_SENDING)
def test_a_phone_that_cannot_run_it_is_refused_before_anything_is_sent(case: str, phone: Phone, toy: Path) -> None:
    breaks, parts = BEFORE_SENDING[case]
    breaks(phone)
    refused(run(toy, "--device", "adb", *FEW), "PHONE1: ", *parts)
    assert phone.left() == []


def test_a_phone_without_enough_memory_is_refused_before_anything_is_sent(phone: Phone, tmp_path: Path) -> None:
    entry = replace(toy_backend(), plan=replace(toy_backend().plan, device_ram_bytes=1 << 50))
    large = write_toy_bundle(tmp_path / "large", backends={"onnx": entry})
    refused(
        run(large, "--device", "adb", *FEW),
        "PHONE1: it has",
        "the bundle's plan says 1073741824 MiB",
        "smaller context",
    )
    assert phone.left() == []


# adb says either of a phone that was unplugged: over a network it stays listed for a while, until adb has tried again
UNPLUGGED = re.compile("PHONE1: it is (gone: was it unplugged|offline: replug it)")


def refused(done: Result, *parts: str) -> None:
    """One line on stderr, exit 2."""
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]  # progress of a log
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.output
    for part in parts:
        assert part in lines[0], lines[0]


def dies(phone: Phone, extras: dict[str, str]) -> None:
    (phone.files / "data/app/alive").unlink()


def killed_for_memory(phone: Phone, extras: dict[str, str]) -> None:
    """As `dumpsys activity exit-info` of Android 14 writes it."""
    record = "ApplicationExitInfo #0:\n  timestamp=2026-01-01 00:00:00.000 pid=4242 realUid=10234 packageUid=10234\n"
    record += (
        "  process=gemma.edge.app reason=3 (LOW_MEMORY) subreason=0 (UNKNOWN) status=0\n  importance=100 pss=1.6GB"
    )
    (phone.files / "data/app/exit-info").write_text(record)
    dies(phone, extras)


def says_why(phone: Phone, extras: dict[str, str]) -> None:
    answer(phone, extras, failure="model.onnx.data was changed", prefill_s=[], ttft_s=[], decode_s=[], decode_ms=[])


def writes_nonsense(phone: Phone, extras: dict[str, str]) -> None:
    results_file(phone, extras).write_text("{")


def hangs(phone: Phone, extras: dict[str, str]) -> None:
    """Alive, and never an answer; what it had begun to write is there."""
    file = results_file(phone, extras)
    file.with_name(f"{file.name}.partial").write_text("{")


WHILE_MEASURING = {
    "crash": (dies, "the app died without a result; see adb -s PHONE1 logcat"),
    "killed for memory": (killed_for_memory, "the phone killed the app for its memory"),
    "its own failure": (says_why, "PHONE1: model.onnx.data was changed"),
    "nonsense": (writes_nonsense, "the app's result holds no results"),
    "hangs": (hangs, "no result after 1 s; measure less, or raise the timeout"),
}


@pytest.mark.parametrize("case", WHILE_MEASURING)
def test_what_goes_wrong_in_the_app_is_one_line_and_leaves_nothing(case: str, phone: Phone, toy: Path) -> None:
    play, part = WHILE_MEASURING[case]
    with app(phone, play):
        done = run(toy, "--device", "adb", *FEW, "--timeout", "1" if case == "hangs" else "60")
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.stdout.splitlines() if "failed:" in line]
    assert part in line and "PHONE1" in line and "Traceback" not in done.output
    assert phone.left() == [] and not (phone.files / "data/app/alive").exists()


def test_an_app_without_the_activity_is_named(phone: Phone, toy: Path) -> None:
    file("no-activity")(phone)
    done = run(toy, "--device", "adb", *FEW)
    assert done.exit_code == 1
    assert (
        "the app cannot be started: Error: Activity class {gemma.edge.app/.BenchmarkActivity} does not exist"
        in done.stdout
    )
    assert phone.left() == []


def test_a_disk_that_fills_up_while_sending(adb: Adb, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough was free when it was asked."""
    small = Phone("SMALL", disk="300k")
    adb.plug_in(small)
    monkeypatch.setattr(phones, "SPARE_BYTES", -(1 << 30))
    refused(run(toy, "--device", "adb", *FEW), "SMALL: it has no space left; free some")
    assert small.left() == []


def test_unplugged_while_sending(phone: Phone, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file, cut off in the middle of it."""
    large = write_toy_bundle(tmp_path / "large")
    (large / "weights").write_bytes(bytes(60 << 20))
    files = json.loads((large / MANIFEST).read_text())["files"]
    edit_json(large / MANIFEST, files={**files, "weights": {"bytes": 60 << 20, "sha256": sha256(large / "weights")}})
    fed = adb_module._Watchdog.fed

    def slowly(self: Any) -> None:
        time.sleep(0.02)
        fed(self)

    monkeypatch.setattr(adb_module._Watchdog, "fed", slowly)

    def pull_the_plug() -> None:
        while not any(file.stat().st_size for file in phone.files.glob("data/local/tmp/gemma-edge/*/weights.partial")):
            time.sleep(0.01)
        phone.unplug()

    thread = threading.Thread(target=pull_the_plug, daemon=True)
    thread.start()
    done = run(large, "--device", "adb", *FEW)
    thread.join()
    refused(done)
    assert UNPLUGGED.search(done.stderr), done.stderr


def test_unplugged_while_measuring(phone: Phone, toy: Path) -> None:
    with app(phone, lambda phone, extras: phone.unplug()):
        done = run(toy, "--device", "adb", *FEW)
    assert done.exit_code == 1
    assert UNPLUGGED.search(done.stdout) and "Traceback" not in done.output, done.output


def test_a_phone_that_does_not_answer(phone: Phone, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb_module, "ANSWER_S", 0.5)
    stuck = adb_module.Device(adb_module.find_adb(), "PHONE1")
    with pytest.raises(adb_module.AdbError, match=r"PHONE1: no answer to 'sleep' for 0 s; replug it"):
        stuck.shell("sleep 60", timeout_s=0.4)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("PHONE2\tunauthorized", "PHONE2: it has not allowed this computer yet"),
        ("PHONE2\toffline", "PHONE2: it is offline: replug it"),
        ("PHONE2\tno permissions (missing udev rules?)", "PHONE2: this computer may not use it"),
    ],
)
def test_a_phone_that_is_not_ready_says_what_to_do(line: str, part: str, adb: Adb, phone: Phone, toy: Path) -> None:
    adb.extra.write_text(f"{line}\n")
    refused(run(toy, "--device", "adb:PHONE2", *FEW), part)


def test_no_phone_an_unknown_one_and_several(adb: Adb, phone: Phone, toy: Path) -> None:
    second = Phone("PHONE2")
    adb.plug_in(second)
    refused(run(toy, "--device", "adb", *FEW), "2 phones are connected: PHONE1, PHONE2", "--all-devices")
    refused(run(toy, "--device", "adb:PHONE3", *FEW), "no such phone; adb sees PHONE1 (device), PHONE2 (device)")
    second.unplug()
    phone.unplug()
    program = adb_module.find_adb()
    while adb_module.list_phones(program):  # until adb has noticed
        time.sleep(0.05)
    refused(run(toy, "--device", "adb", *FEW), "no phone is connected", "USB debugging")


def test_one_phone_with_two_transports_counts_once(adb: Adb, phone: Phone, toy: Path) -> None:
    """By its own serial number: adb lists a phone by cable and by Wi-Fi as two."""
    twin = Phone("10.0.0.7:5555")
    adb.plug_in(twin)
    twin.set_properties(**{"ro.serialno": "own-PHONE1"})
    with app(phone, answer) as played:
        assert run(toy, "--device", "adb", *FEW).exit_code == 0
    assert len(played.started) == 1


def test_all_devices_go_into_one_report_and_one_that_fails_does_not_stop_the_rest(
    adb: Adb, phone: Phone, toy: Path, tmp_path: Path
) -> None:
    second, third = Phone("PHONE2"), Phone("PHONE3")
    for one in (second, third):
        adb.plug_in(one)
    second.set_properties(**{"ro.serialno": "b", "ro.product.model": "Phone 2"})
    third.set_properties(**{"ro.serialno": "c", "ro.product.cpu.abilist": "armeabi-v7a"})
    adb.extra.write_text("PHONE4\tunauthorized\n")
    saved = tmp_path / "all.json"
    with app(phone, answer), app(second, answer):
        done = run(toy, "--all-devices", *FEW, "--save", saved)
    assert done.exit_code == 1, done.output
    assert "Example Phone 1" in done.stdout and "Example Phone 2" in done.stdout
    assert "PHONE3: its ABI is armeabi-v7a" in done.stdout
    assert "PHONE4: it has not allowed this computer yet" in done.stderr
    found = bench_result.load([saved])
    assert [result.device["name"] for result in found] == ["Example Phone 1", "Example Phone 2", "Example Phone 1"]
    assert [bool(result.failure) for result in found] == [False, False, True]
    # what only the app knows stays
    assert found[0].device["read_gb_per_s"] == 20.0 and found[0].state["after"]["thermal_headroom"] == 0.6
    assert phone.left() == second.left() == third.left() == []


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--device", "usb"], ["only adb and adb:SERIAL are known"]),
        (["--device", "adb", "--peer", "genai"], ["phones measure bundles, and no --peer"]),
        (["--device", "adb", "--backend", "torch"], ["--backend torch", "executorch, tflite, onnx, all"]),
        (["--device", "adb", "--timeout", "0"], ["--timeout 0 is not above 0"]),
        (["--device", "adb:X", "--all-devices"], ["give one of the two"]),
    ],
)
def test_options_that_do_not_go_together(args: list[str], parts: list[str], toy: Path) -> None:
    refused(run(toy, *FEW, *args), *parts)
