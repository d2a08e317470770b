"""The app without Android SDK and Gradle: resources, classes, dex, a signed APK, and a look at the result.

Each stage is skipped when it was made from the same inputs before. Needs JDK 17, Maven, npm; `make android` compiles the
library first, with Maven: the APK holds the classes that were tested.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path

from apk_zip import check_apk, write_apk
from r_classes import write_r_classes
from toolchain import (
    ANDROID,
    BUILD,
    PINS,
    aapt2,
    class_path,
    framework,
    jars_of,
    java_home,
    kotlinc,
    maven,
    once,
    onnxruntime_aar,
    run,
    unpacked,
)

APP = ANDROID / "app" / "src" / "main"
GEMMA_CLASSES = ANDROID / "gemma" / "target" / "classes"
PACKAGE = "gemma.edge.app"
ABIS = ("arm64-v8a", "x86_64")
MIN_SDK, TARGET_SDK = str(PINS["versions"]["min_sdk"]), str(PINS["versions"]["target_sdk"])
VERSION_CODE, VERSION_NAME = "1", "0.1.0"
APK = BUILD / "gemma-edge.apk"
# A key for trying the app: anybody can make the same. To publish, sign build/apk/unsigned.apk with a key of your own.
KEYSTORE, PASSWORD, ALIAS = BUILD / "debug.p12", "android", "debug"


@dataclass(frozen=True)
class Libraries:
    """What the app is linked with."""

    plain: Path  # folder of jars and AARs
    aars: list[Path]  # unpacked
    onnxruntime: Path  # unpacked, also one of aars

    @property
    def jars(self) -> list[Path]:
        """All classes."""
        return jars_of(self.plain, self.aars)


def libraries(ort_aar: Path | None) -> Libraries:
    """Fetch and unpack."""
    plain = maven("libraries")
    aars = unpacked(sorted(plain.glob("*.aar")), "aars")
    onnxruntime = unpacked([onnxruntime_aar(ort_aar)], "onnxruntime-aar")
    return Libraries(plain, [*aars, *onnxruntime], onnxruntime[0])


def sources(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def compiled_resources(linked: Libraries) -> list[Path]:
    """Resources of the libraries, compiled by aapt2."""
    with_resources = [aar for aar in linked.aars if (aar / "res").is_dir()]

    def compile_all(folder: Path) -> None:
        for aar in with_resources:
            run([aapt2(), "compile", "--dir", aar / "res", "-o", folder / f"{aar.name}.zip"])

    return sorted(once("library-resources", [aar.name for aar in with_resources], compile_all).glob("*.zip"))


def link(linked: Libraries) -> Path:
    """The merged manifest, app.ap_ (manifest and resources) and R.jar, in one folder."""
    flat = compiled_resources(linked)

    def make(folder: Path) -> None:
        merged = folder / "AndroidManifest.xml"
        manifests = [aar / "AndroidManifest.xml" for aar in linked.aars]
        properties = {"PACKAGE": PACKAGE, "MIN_SDK_VERSION": MIN_SDK, "TARGET_SDK_VERSION": TARGET_SDK}
        merge = [
            "java",
            "-cp",
            f"{maven('tools')}/*",
            "com.android.manifmerger.Merger",
            "--log",
            "ERROR",
            "--out",
            merged,
        ]
        merge += ["--main", APP / "AndroidManifest.xml", "--libs", class_path(manifests)]
        run([*merge, *(word for key, value in properties.items() for word in ("--property", f"{key}={value}"))])
        run([aapt2(), "compile", "--dir", APP / "res", "-o", folder / "app.zip"])
        command: list[object] = [aapt2(), "link", "-I", framework(), "--manifest", merged, "-o", folder / "app.ap_"]
        command += ["--auto-add-overlay", "--no-version-vectors", "--min-sdk-version", MIN_SDK]
        command += ["--target-sdk-version", TARGET_SDK, "--version-code", VERSION_CODE, "--version-name", VERSION_NAME]
        command += [
            "--java",
            folder / "java",
            "--output-text-symbols",
            folder / "R.txt",
            "--proguard",
            folder / "aapt.pro",
        ]
        for path in [*flat, folder / "app.zip"]:
            command += ["-R", path]
        run(command)
        write_r_classes(folder / "R.txt", linked.aars, folder / "java")
        run(["javac", "-nowarn", "--release", "17", "-d", folder / "R", *sources(folder / "java")])
        run(["jar", "cf", folder / "R.jar", "-C", folder / "R", "."])

    inputs = [APP / "AndroidManifest.xml", *sources(APP / "res"), PINS, Path(__file__)]
    return once("linked", inputs, make)


def compile_app(linked: Libraries, resources: Path) -> Path:
    """app.jar."""
    files = sources(APP / "kotlin")
    jars = [*linked.jars, resources / "R.jar", GEMMA_CLASSES]
    inputs = [*files, resources / "R.txt", *sources(GEMMA_CLASSES), PINS]
    return once("app-classes", inputs, lambda folder: kotlinc(files, jars, folder / "app.jar")) / "app.jar"


def gemma_jar() -> Path:
    """The library's classes, as Maven compiled and tested them."""

    def pack(folder: Path) -> None:
        run(["jar", "cf", folder / "gemma.jar", "-C", GEMMA_CLASSES, "gemma"])

    inputs = sources(GEMMA_CLASSES)
    if not inputs:
        raise SystemExit(f"no classes in {GEMMA_CLASSES}: run make android, which compiles them")
    return once("gemma", inputs, pack) / "gemma.jar"


def dex(name: str, jars: list[Path], beside: list[Path]) -> list[Path]:
    """Dex files of some jars, which may use those beside them."""

    def make(folder: Path) -> None:
        command: list[object] = [
            "java",
            "-Xmx2g",
            "-cp",
            next(maven("tools").glob("r8-*.jar")),
            "com.android.tools.r8.D8",
        ]
        command += ["--release", "--min-api", MIN_SDK, "--lib", framework(), "--lib", java_home(), "--output", folder]
        for path in beside:
            command += ["--classpath", path]
        run([*command, *jars])

    return sorted(once(name, [*jars, *(path.name for path in beside), MIN_SDK], make).glob("*.dex"))


def shrunk(jars: list[Path], linked: Libraries, resources: Path) -> list[Path]:
    """Dex files of everything, by R8: minutes, and a third of the size."""

    def make(folder: Path) -> None:
        rules = [aar / "proguard.txt" for aar in linked.aars] + [
            resources / "aapt.pro",
            ANDROID / "app" / "proguard-rules.pro",
            ANDROID / "gemma" / "consumer-rules.pro",
        ]
        command: list[object] = [
            "java",
            "-Xmx3g",
            "-cp",
            next(maven("tools").glob("r8-*.jar")),
            "com.android.tools.r8.R8",
        ]
        command += ["--release", "--min-api", MIN_SDK, "--lib", framework(), "--lib", java_home(), "--output", folder]
        for path in rules:
            command += ["--pg-conf", path] if path.is_file() else []
        run([*command, *jars])

    return sorted(once("dex-shrunk", [*jars, MIN_SDK], make).glob("*.dex"))


def asset_files(bundle: Path) -> dict[str, Path]:
    """A bundle's files by their names in the APK."""
    return {f"assets/{bundle.name}/{path.relative_to(bundle).as_posix()}": path for path in sources(bundle)}


def package(linked: Libraries, resources: Path, dexes: list[Path], assets: Path, abis: tuple[str, ...]) -> Path:
    """The signed APK."""
    files = {f"classes{number if number > 1 else ''}.dex": path for number, path in enumerate(dexes, 1)}
    for abi in abis:
        files |= {f"lib/{abi}/{path.name}": path for path in sorted((linked.onnxruntime / "jni" / abi).glob("*.so"))}
    files |= asset_files(assets)
    unsigned = BUILD / "unsigned.apk"
    write_apk(unsigned, resources / "app.ap_", files)
    if not KEYSTORE.exists():
        make_key: list[object] = [
            "keytool",
            "-genkeypair",
            "-keystore",
            KEYSTORE,
            "-storetype",
            "PKCS12",
            "-storepass",
            PASSWORD,
        ]
        run(
            [
                *make_key,
                "-alias",
                ALIAS,
                "-keyalg",
                "RSA",
                "-keysize",
                "2048",
                "-validity",
                "10000",
                "-dname",
                "CN=debug",
            ]
        )
    apksig = next(maven("tools").glob("apksig-*.jar"))
    print(
        run(
            [
                "java",
                "-cp",
                apksig,
                Path(__file__).with_name("Sign.java"),
                KEYSTORE,
                PASSWORD,
                ALIAS,
                unsigned,
                APK,
                MIN_SDK,
            ]
        ).strip()
    )
    check_apk(APK, abis)
    return APK


def check_badging(apk: Path, abis: tuple[str, ...]) -> None:
    """What aapt2 reads from the finished APK.

    Raises:
        SystemExit: the package, an SDK version or an ABI is another one, or a permission is asked for that needs no asking.
    """
    badging = run([aapt2(), "dump", "badging", apk])
    wanted = {
        "package": rf"^package: name='{PACKAGE}'",
        "minSdk": rf"^(minSdkVersion|sdkVersion):'{MIN_SDK}'",
        "targetSdk": rf"^targetSdkVersion:'{TARGET_SDK}'",
        "launcher": rf"^launchable-activity: name='{PACKAGE}\.ChatActivity'",
        **{abi: rf"^native-code:.*'{abi}'" for abi in abis},
    }
    for what, pattern in wanted.items():
        if not re.search(pattern, badging, re.MULTILINE):
            raise SystemExit(f"{apk}: {what} is not as wanted ({pattern})\n{badging}")
    if "android.permission.INTERNET" in badging:
        raise SystemExit(f"{apk} asks for the INTERNET permission: a library's manifest brought it in")


def main() -> None:
    """Build; say how long each stage took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, help="the bundle that the app starts with")
    parser.add_argument(
        "--ort-aar", type=Path, help="onnxruntime-android from Maven Central, in place of the pinned repack"
    )
    parser.add_argument("--shrink", action="store_true", help="R8 in place of D8: smaller, minutes")
    parser.add_argument("--abi", action="append", choices=ABIS, help="only these; default all")
    parser.add_argument("--classes-only", action="store_true", help="stop before dex: what the tests need")
    options = parser.parse_args()
    abis = tuple(options.abi or ABIS)
    start = time.monotonic()

    def say(stage: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {stage}", flush=True)

    linked = libraries(options.ort_aar)
    say("libraries")
    resources = link(linked)
    say("resources")
    app = compile_app(linked, resources)
    say("classes")
    if options.classes_only:
        return
    own, others = [app, gemma_jar(), resources / "R.jar"], linked.jars
    if options.shrink:
        dexes = shrunk([*own, *others], linked, resources)
    else:
        dexes = [*dex("dex-app", own, others), *dex("dex-libraries", others, [resources / "R.jar"])]
    say("dex")
    apk = package(linked, resources, dexes, options.assets, abis)
    check_badging(apk, abis)
    say(f"{apk}: {apk.stat().st_size / 1e6:.1f} MB, {', '.join(abis)}")


if __name__ == "__main__":
    main()
