"""tools/apk and tools/native: what a module and an APK hold, and when logits of a phone's libraries count as Python's."""

from __future__ import annotations

import json
import re
import struct
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support.checkpoints import ROOT

ANDROID = ROOT / "android_demo"
MODULES = ("gemma", "gemma-executorch", "gemma-litert", "gemma-onnx")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(ROOT / "tools" / name) for name in ("apk", "native")]
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])


@pytest.mark.parametrize("module", MODULES)
def test_a_published_module_depends_on_what_its_gradle_script_names(module: str) -> None:
    import build_aar

    space = "{http://maven.apache.org/POM/4.0.0}"
    pom = ElementTree.fromstring(build_aar.pom(module, "https://example.org/a?b&c").encode())
    nodes = pom.findall(f"{space}dependencies/{space}dependency")
    published = {
        ":".join(node.findtext(f"{space}{tag}", "") for tag in ("groupId", "artifactId", "version")): node.findtext(
            f"{space}scope"
        )
        for node in nodes
    }
    script = (ANDROID / module / "build.gradle.kts").read_text(encoding="utf-8")
    expected = {f"org.jetbrains.kotlin:kotlin-stdlib:{build_aar.CATALOG['versions']['kotlin']}": "compile"}
    scopes = {"api": "compile", "implementation": "runtime"}
    for kind, entry, other in re.findall(
        r'(?m)^    (api|implementation)\((?:libs\.([\w.]+)|project\(":(\w+)"\))', script
    ):
        name = ":".join(build_aar.of_catalog(entry.replace(".", "-"))) if entry else f"gemma.edge:{other}:0.1.0"
        expected[name] = scopes[kind]
    assert published == expected
    assert pom.findtext(f"{space}packaging") == "aar" and len(pom.findtext(f"{space}description", "")) > 10
    # Maven Central takes no library without these
    for tags in (["url"], ["scm", "url"], ["developers", "developer", "url"]):
        assert pom.findtext("/".join(f"{space}{tag}" for tag in tags)) == "https://example.org/a?b&c"
    assert pom.findtext(f"{space}scm/{space}connection") == "scm:git:https://example.org/a?b&c"


@pytest.mark.parametrize("module", MODULES)
def test_an_aar_holds_what_gradle_reads(module: str, tmp_path: Path) -> None:
    import build_aar

    jar = tmp_path / "classes.jar"
    build_aar.write_zip(jar, {"gemma/A.class": b"\xca\xfe"})
    files = build_aar.aar(module, jar)
    assert files["classes.jar"] == jar.read_bytes()
    assert files["proguard.txt"] == (ANDROID / module / "consumer-rules.pro").read_bytes()
    manifest = ElementTree.fromstring(files["AndroidManifest.xml"])
    assert manifest.attrib["package"].startswith("gemma.edge")
    android = "{http://schemas.android.com/apk/res/android}"
    assert [node.attrib[f"{android}minSdkVersion"] for node in manifest.iter("uses-sdk")] == ["26"]
    lines = dict(line.split("=") for line in files[build_aar.METADATA].decode().split())
    assert {"aarFormatVersion", "aarMetadataVersion"} <= lines.keys()


def library(alignment: int) -> bytes:
    """A 64-bit library with one loaded segment of this alignment, as far as an APK's check reads it."""
    header = bytearray(120)
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    struct.pack_into("<I", header, 64, 1)
    struct.pack_into("<Q", header, 112, alignment)
    return bytes(header)


def write_test_apk(folder: Path, libraries: dict[str, bytes]) -> Path:
    """An APK with these libraries, written as the app's is."""
    import apk_zip

    with zipfile.ZipFile(folder / "linked", "w") as linked:
        linked.writestr("AndroidManifest.xml", "x" * 7)
    files = {}
    for number, (name, data) in enumerate(libraries.items()):
        (folder / str(number)).write_bytes(data)
        files[name] = folder / str(number)
    apk_zip.write_apk(folder / "app.apk", folder / "linked", files)
    return folder / "app.apk"


def test_every_native_library_of_an_apk_must_fit_pages_of_16_kib(tmp_path: Path) -> None:
    import apk_zip

    good = {"lib/arm64-v8a/liba.so": library(16384), "lib/arm64-v8a/libb.so": library(65536)}
    apk = write_test_apk(tmp_path, good)
    apk_zip.check_apk(apk, ("arm64-v8a",))
    with pytest.raises(SystemExit, match="x86_64.* are expected"):
        apk_zip.check_apk(apk, ("arm64-v8a", "x86_64"))
    for bad in (4096, 8192):
        apk = write_test_apk(tmp_path, {**good, "lib/arm64-v8a/libc.so": library(bad)})
        with pytest.raises(SystemExit, match="libc.so was linked for smaller pages"):
            apk_zip.check_apk(apk, ("arm64-v8a",))
    with zipfile.ZipFile(tmp_path / "moved.apk", "w") as moved:
        moved.writestr("lib/arm64-v8a/liba.so", library(16384))
    with pytest.raises(SystemExit, match="not stored at a multiple of 16384"):
        apk_zip.check_apk(tmp_path / "moved.apk", ("arm64-v8a",))


def test_engines_are_chosen_by_backend_and_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    import build_apk

    assert build_apk.engine_names("onnx,executorch") == ["executorch", "onnx"]
    for arguments, refusal in (
        (["--engines", "onnx,litert"], "'litert' is none of executorch, tflite, onnx"),
        (["--onnx-aar", "absent.aar"], "absent.aar: no such file"),
        (["--tflite-aar", __file__], "no effect without tflite"),
    ):
        monkeypatch.setattr(sys, "argv", ["build_apk.py", "bundle", *arguments])
        errors: list[str] = []
        monkeypatch.setattr("argparse.ArgumentParser.error", lambda _, message, to=errors: to.append(message))
        build_apk.parsed()
        assert refusal in errors[0]


@pytest.mark.parametrize(
    ("change", "refused"), [(0.0, ""), (0.01, ""), (3.0, "same top token 1 of 2"), (0.5, "KL"), (np.nan, "KL")]
)
def test_logits_of_other_kernels_must_be_pythons_but_for_rounding(change: float, refused: str, tmp_path: Path) -> None:
    import parity

    logits = np.array([[0.0, 1.0, 4.0], [3.0, 1.0, 2.0]], dtype="<f4")
    for name in ("models/demo", "from-kotlin/demo"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/demo/answers.json").write_text(json.dumps({"calls": [5, 1]}), encoding="utf-8")
    logits.tofile(tmp_path / "models/demo/runtime.f32")
    logits[1, 2] += change
    logits.tofile(tmp_path / "from-kotlin/demo/onnx.f32")
    if not refused:
        assert "same top token 2 of 2" in parity.compare(tmp_path, "onnx")
        return
    with pytest.raises(SystemExit, match=refused):
        parity.compare(tmp_path, "onnx")


def test_logits_that_were_not_written_are_missed(tmp_path: Path) -> None:
    import parity

    with pytest.raises(SystemExit, match="wrote no logits"):
        parity.compare(tmp_path, "onnx")


def test_a_stand_in_jumps_to_every_jni_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import proxy

    symbols = "0000 T Java_a_b_c\n0000 T Java_a_b_d@@V1\n0000 T JNI_OnLoad\n0000 T other\n"
    monkeypatch.setattr(proxy, "run", lambda _: symbols)
    for machine, jump in proxy.JUMPS.items():
        source = proxy.proxy_source(Path("/x/liba.so"), machine)
        for name in ("Java_a_b_c", "Java_a_b_d"):
            assert f'slot_{name} = bionic_symbol(library, "{name}")' in source
            assert jump.split()[0] in source and source.count(f".globl {name}\\n") == 1
        assert "slot_other" not in source and 'bionic_load("/x", "liba.so")' in source
