"""Build the app's signed APK without Android SDK and Gradle, and check the finished file.

The stages are resources, classes, dex and packaging; a stage is skipped when its inputs have not changed. This needs
JDK 17, Maven and npm. `make android` compiles the library first, with Maven, so the APK holds the classes that were tested.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from apk_zip import check_apk, write_apk
from bindings import write_bindings
from engines import ENGINES, Engine
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
    packed,
    run,
    unpacked,
)

APP = ANDROID / "app" / "src" / "main"
MODULES = ("gemma", "gemma-onnx")  # of the library, in the app that is released
GEMMA_CLASSES = [ANDROID / module / "target" / "classes" for module in MODULES]
PACKAGE = "gemma.edge.app"
ABIS = ("arm64-v8a", "x86_64")
# INTERNET is for downloads, the others for imports that go on while no screen of the app is in front.
PERMISSIONS = ["INTERNET", "FOREGROUND_SERVICE", "FOREGROUND_SERVICE_DATA_SYNC", "POST_NOTIFICATIONS", "WAKE_LOCK"]
MIN_SDK, TARGET_SDK = str(PINS["versions"]["min_sdk"]), str(PINS["versions"]["target_sdk"])
VERSION_CODE, VERSION_NAME = "1", "0.1.0"
APK = BUILD / "gemma-edge.apk"
# A key for trying the app: anybody can make the same. To publish, sign UNSIGNED with a key of your own.
KEYSTORE, PASSWORD, ALIAS = BUILD / "debug.p12", "android", "debug"
UNSIGNED = BUILD / "unsigned.apk"
NEW_KEY = "keytool -genkeypair -storetype PKCS12 -keyalg RSA -keysize 2048 -validity 10000 -dname CN=debug".split()


@dataclass(frozen=True)
class Libraries:
    """What the app is linked with."""

    plain: Path  # folder of the jars and AARs as downloaded
    aars: list[Path]  # folders of the unpacked AARs
    engines: list[Engine]

    @property
    def common(self) -> list[Path]:
        """The jars with the classes of all libraries but the engines'."""
        return jars_of(self.plain, self.aars)

    @property
    def jars(self) -> list[Path]:
        """The jars with the classes of all libraries."""
        return [*self.common, *(jar for engine in self.engines for jar in engine.jars)]

    @property
    def modules(self) -> list[str]:
        """The modules of our library."""
        return ["gemma", *(engine.module for engine in self.engines)]


def libraries(engines: list[Engine]) -> Libraries:
    """Download the libraries and unpack their AARs."""
    plain = maven("libraries")
    return Libraries(plain, unpacked(sorted(plain.glob("*.aar")), "aars"), engines)


def sources(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def java_tool(jars: object, main: object, *arguments: object, heap: str = "2g") -> str:
    """Run a Java program of the tool chain and return its output.

    Args:
        jars: its class path.
        main: its main class, or a Java source file.
        arguments: what it is given.
        heap: its largest heap, as `-Xmx` takes it.
    """
    return run(["java", f"-Xmx{heap}", "-cp", jars, main, *arguments])


def compiled_resources(linked: Libraries) -> list[Path]:
    """Resources of the libraries, compiled by aapt2."""
    with_resources = [aar for aar in linked.aars if (aar / "res").is_dir()]

    def compile_all(folder: Path) -> None:
        for aar in with_resources:
            run([aapt2(), "compile", "--dir", aar / "res", "-o", folder / f"{aar.name}.zip"])

    return sorted(once("library-resources", [aar.name for aar in with_resources], compile_all).glob("*.zip"))


def merged_manifest(linked: Libraries, out: Path) -> Path:
    """Merge the app's manifest with those of the libraries."""
    manifests = class_path(aar / "AndroidManifest.xml" for aar in linked.aars)
    arguments: list[object] = [
        "--log",
        "ERROR",
        "--out",
        out,
        "--main",
        APP / "AndroidManifest.xml",
        "--libs",
        manifests,
    ]
    properties = {"PACKAGE": PACKAGE, "MIN_SDK_VERSION": MIN_SDK, "TARGET_SDK_VERSION": TARGET_SDK}
    for key, value in properties.items():
        arguments += ["--property", f"{key}={value}"]
    java_tool(f"{maven('tools')}/*", "com.android.manifmerger.Merger", *arguments)
    return out


def generated_jar(linked: Libraries, java: Path, symbols: Path) -> None:
    """Compile the generated classes, R and the view bindings, into `R.jar` beside the symbols.

    Args:
        java: folder of the sources; it holds aapt2's R class of the app.
        symbols: the R.txt of the linked app.
    """
    write_r_classes(symbols, linked.aars, java)
    write_bindings(APP / "res", PACKAGE, java)
    classes = symbols.with_name("R")
    jars = class_path([*linked.jars, framework()])
    run(["javac", "-nowarn", "--release", "17", "-cp", jars, "-d", classes, *sources(java)])
    run(["jar", "cf", symbols.with_name("R.jar"), "-C", classes, "."])


def link(linked: Libraries) -> Path:
    """One folder with the merged manifest, app.ap_ (manifest and resources) and R.jar (R and view binding classes)."""
    flat = compiled_resources(linked)

    def make(folder: Path) -> None:
        merged = merged_manifest(linked, folder / "AndroidManifest.xml")
        run([aapt2(), "compile", "--dir", APP / "res", "-o", folder / "app.zip"])
        command: list[object] = [aapt2(), "link", "-I", framework(), "--manifest", merged, "-o", folder / "app.ap_"]
        command += ["--auto-add-overlay", "--no-version-vectors", "--min-sdk-version", MIN_SDK]
        command += ["--target-sdk-version", TARGET_SDK, "--version-code", VERSION_CODE, "--version-name", VERSION_NAME]
        command += ["--java", folder / "java", "--output-text-symbols", folder / "R.txt"]
        command += ["--proguard", folder / "aapt.pro"]
        for path in [*flat, folder / "app.zip"]:
            command += ["-R", path]
        run(command)
        generated_jar(linked, folder / "java", folder / "R.txt")

    scripts = [Path(__file__).with_name(f"{name}.py") for name in ("bindings", "build_apk", "r_classes", "toolchain")]
    return once("linked", [APP / "AndroidManifest.xml", *sources(APP / "res"), PINS, *scripts], make)


def compile_app(linked: Libraries, resources: Path) -> Path:
    """Compile the app's own sources into app.jar."""
    files = sources(APP / "kotlin")
    jars = [*linked.jars, resources / "R.jar", *GEMMA_CLASSES]
    inputs = [*files, *sources(resources / "java"), *gemma_files(), PINS]
    return once("app-classes", inputs, lambda folder: kotlinc(files, jars, folder / "app.jar")) / "app.jar"


def gemma_files() -> list[Path]:
    """The library's class files, as Maven compiled and tested them.

    Raises:
        SystemExit: a module was not compiled.
    """
    for classes in GEMMA_CLASSES:
        if not classes.is_dir():
            raise SystemExit(f"no classes in {classes}: run make android, which compiles them")
    return [path for classes in GEMMA_CLASSES for path in sources(classes)]


def r8(tool: str, out: Path, arguments: list[object], heap: str) -> None:
    """Run D8 or R8, which come in one jar, on class files for the oldest Android that the app supports."""
    command: list[object] = ["--release", "--min-api", MIN_SDK, "--lib", framework(), "--lib", java_home()]
    jar = next(maven("tools").glob("r8-*.jar"))
    java_tool(jar, f"com.android.tools.r8.{tool}", *command, "--output", out, *arguments, heap=heap)


def dex(name: str, jars: list[Path], beside: list[Path]) -> list[Path]:
    """Dex files of some jars, whose classes may use those of the jars beside them."""

    def make(folder: Path) -> None:
        class_paths = [part for path in beside for part in ("--classpath", path)]
        r8("D8", folder, [*class_paths, *jars], heap="2g")

    return sorted(once(name, [*jars, *(path.name for path in beside), MIN_SDK], make).glob("*.dex"))


def shrunk(jars: list[Path], linked: Libraries, resources: Path) -> list[Path]:
    """Dex files of everything, shrunk by R8. This takes minutes and gives a third of the size."""
    rules = [
        *(aar / "proguard.txt" for aar in linked.aars),
        *(path for engine in linked.engines for path in engine.rules),
        resources / "aapt.pro",
        ANDROID / "app" / "proguard-rules.pro",
        *(ANDROID / module / "consumer-rules.pro" for module in linked.modules),
    ]

    def make(folder: Path) -> None:
        configurations = [part for path in rules if path.is_file() for part in ("--pg-conf", path)]
        r8("R8", folder, [*configurations, *jars], heap="3g")

    return sorted(once("dex-shrunk", [*jars, MIN_SDK], make).glob("*.dex"))


def dex_files(app: Path, linked: Libraries, resources: Path, *, shrink: bool) -> list[Path]:
    """Dex files of the whole app."""
    gemma = packed("gemma", [ANDROID / module / "target" / "classes" for module in linked.modules])
    own = [app, gemma, resources / "R.jar"]
    if shrink:
        return shrunk([*own, *linked.jars], linked, resources)
    of_engines = [
        path for engine in linked.engines for path in dex(f"dex-{engine.backend}", engine.jars, linked.common)
    ]
    return [
        *dex("dex-app", own, linked.jars),
        *dex("dex-libraries", linked.common, [resources / "R.jar"]),
        *of_engines,
    ]


def asset_files(bundle: Path) -> dict[str, Path]:
    """A bundle's files by their names in the APK."""
    return {f"assets/{bundle.name}/{path.relative_to(bundle).as_posix()}": path for path in sources(bundle)}


def package(linked: Libraries, resources: Path, dexes: list[Path], assets: Path, abis: tuple[str, ...]) -> Path:
    """Pack and sign the APK."""
    files = {f"classes{number if number > 1 else ''}.dex": path for number, path in enumerate(dexes, 1)}
    for abi in abis:
        libraries = (path for engine in linked.engines for path in engine.natives(abi))
        files |= {f"lib/{abi}/{path.name}": path for path in libraries}
    versions = BUILD / "engines.json"
    versions.write_text(json.dumps({engine.backend: engine.version for engine in linked.engines}), encoding="utf-8")
    write_apk(UNSIGNED, resources / "app.ap_", files | asset_files(assets) | {"assets/engines.json": versions})
    if not KEYSTORE.exists():
        run([*NEW_KEY, "-keystore", KEYSTORE, "-storepass", PASSWORD, "-alias", ALIAS])
    apksig = next(maven("tools").glob("apksig-*.jar"))
    signer = Path(__file__).with_name("Sign.java")
    print(java_tool(apksig, signer, KEYSTORE, PASSWORD, ALIAS, UNSIGNED, APK, MIN_SDK).strip())
    check_apk(APK, abis)
    return APK


def check_badging(apk: Path, abis: tuple[str, ...]) -> None:
    """Check what aapt2 reads from the finished APK.

    Raises:
        SystemExit: the package, an SDK version, the launcher activity, an ABI or a permission is not the expected one.
    """
    badging = run([aapt2(), "dump", "badging", apk])
    expected = {
        "package": rf"^package: name='{PACKAGE}'",
        "minSdk": rf"^(minSdkVersion|sdkVersion):'{MIN_SDK}'",
        "targetSdk": rf"^targetSdkVersion:'{TARGET_SDK}'",
        "launcher": rf"^launchable-activity: name='{PACKAGE}\.ChatActivity'",
        **{abi: rf"^native-code:.*'{abi}'" for abi in abis},
    }
    for what, pattern in expected.items():
        if not re.search(pattern, badging, re.MULTILINE):
            raise SystemExit(f"{apk}: {what} is not as expected ({pattern})\n{badging}")
    permissions = re.findall(r"^uses-permission: name='android\.permission\.(.*?)'", badging, re.MULTILINE)
    if permissions != PERMISSIONS:
        raise SystemExit(
            f"{apk} asks for {permissions}, {PERMISSIONS} is expected: a library's manifest brought others in"
        )


def engine_names(text: str) -> list[str]:
    """Comma-separated backends, in the order of ENGINES.

    Raises:
        argparse.ArgumentTypeError: there is none, or one is unknown.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(ENGINES)}")
    return [name for name in ENGINES if name in names]


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, help="the bundle that the app comes with")
    parser.add_argument(
        "--engines", type=engine_names, default=["onnx"], help="backends that the app runs, with commas"
    )
    for name in ENGINES:
        parser.add_argument(
            f"--{name}-aar", type=Path, help=f"the official library for {name}, instead of the pinned one"
        )
    parser.add_argument(
        "--shrink", action="store_true", help="shrink with R8, which takes minutes, instead of using D8"
    )
    parser.add_argument(
        "--abi", action="append", choices=ABIS, help="an ABI to build for, may be repeated; default: all"
    )
    parser.add_argument("--out", type=Path, default=APK, help="the file to write")
    parser.add_argument("--classes-only", action="store_true", help="stop after compiling the app's classes")
    options = parser.parse_args()
    for name in ENGINES:
        aar = getattr(options, f"{name}_aar")
        if aar and not aar.is_file():
            parser.error(f"--{name}-aar {aar}: no such file")
        if aar and name not in options.engines:
            parser.error(f"--{name}-aar has no effect without {name} in --engines")
    return options


def main() -> None:
    """Build the APK and print how long each stage took."""
    options = parsed()
    abis = tuple(options.abi or ABIS)
    start = time.monotonic()

    def say(stage: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {stage}", flush=True)

    linked = libraries([ENGINES[name](getattr(options, f"{name}_aar")) for name in options.engines])
    if "tflite" in options.engines and not options.tflite_aar:
        print(
            "tflite is a stand-in that shows the size and does not run on a phone; --tflite-aar FILE takes the official"
        )
    say("libraries")
    resources = link(linked)
    say("resources")
    app = compile_app(linked, resources)
    say("classes")
    if options.classes_only:
        return
    dexes = dex_files(app, linked, resources, shrink=options.shrink)
    say("dex")
    apk = package(linked, resources, dexes, options.assets, abis)
    check_badging(apk, abis)
    apk.replace(options.out)
    engines = ", ".join(options.engines)
    say(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {', '.join(abis)}, {engines}")


if __name__ == "__main__":
    main()
