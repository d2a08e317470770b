"""Run a JVM for arm64 on this machine: Debian's, under qemu, with libraries that zig's C compiler makes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from engines import downloaded_wheel
from libraries import FLAGS, TOOLS, Abi
from toolchain import CHAIN, PINS, once, run

# CPU: what qemu pretends to be; ONNX Runtime's library ends the process on `max`, whose instructions qemu lacks in part.
CPU = "cortex-a76"
DEBIAN = Path(__file__).parents[1] / "debian.sh"
PACKAGES = ("qemu-user", *(f"{name}:arm64" for name in ("libc6", "libgcc-s1", "libstdc++6", "zlib1g")))
JDK = "21"


def debian() -> Path | None:
    """The folder with qemu and an arm64 JVM, or None where Debian's packages cannot be had."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None

    def fetch(folder: Path) -> None:
        jdk = f"openjdk-{JDK}-jre-headless:arm64"
        subprocess.run(
            [DEBIAN, folder, "amd64,arm64", "download", *PACKAGES, jdk], check=True, stderr=subprocess.PIPE, text=True
        )
        for path in (folder / "usr" / "bin").glob("qemu-*"):
            if path.name != "qemu-aarch64":
                path.unlink()
        (folder / "lib").symlink_to("usr/lib")
        for link in (folder / "usr" / "lib" / "jvm").rglob("*"):  # Java reads links itself, past qemu's folder
            if link.is_symlink() and (target := folder / str(link.readlink()).lstrip("/")).is_file():
                link.unlink()
                shutil.copy(target, link)

    try:
        return once("debian-arm64", [PACKAGES, JDK, DEBIAN], fetch, CHAIN)
    except subprocess.CalledProcessError as error:
        print(error.stderr.strip(), file=sys.stderr)
        return None


def compiler() -> tuple[object, ...]:
    """The C compiler for arm64."""

    def fetch(folder: Path) -> None:
        wheel = downloaded_wheel(PINS["zig"]["wheel"], folder)
        run([sys.executable, "-m", "zipfile", "-e", wheel, folder])
        wheel.unlink()
        (folder / "ziglang" / "zig").chmod(0o755)

    zig = once("zig", [PINS["zig"]], fetch, CHAIN) / "ziglang" / "zig"
    return zig, "cc", "-target", "aarch64-linux-gnu.2.36", "-fno-sanitize=all"


def abi() -> Abi:
    """Android's ABI for phones."""
    return Abi("arm64-v8a", "aarch64", compiler())


def pad() -> Path:
    """The library that keeps what is at bionic's place of the stack guard."""

    def build(folder: Path) -> None:
        run([*compiler(), *FLAGS, "-o", folder / "libpad.so", TOOLS / "pad.c"])

    return once("native-pad", [TOOLS / "pad.c", compiler()], build) / "libpad.so"


def jvm(system: Path) -> list[object]:
    """The command that starts the JVM, which interprets everything: what its compilers make would be translated once more.

    Args:
        system: the folder of `debian`.
    """
    java = system / "usr" / "lib" / "jvm" / f"java-{JDK}-openjdk-arm64" / "bin" / "java"
    emulator: list[object] = [system / "usr" / "bin" / "qemu-aarch64", "-cpu", CPU, "-L", system]
    return [*emulator, "-E", f"LD_PRELOAD={pad()}", java, "-Xint"]
