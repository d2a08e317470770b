"""The C source of a library that stands for one of Android's: `System.loadLibrary` finds it, and it calls the real one."""

from __future__ import annotations

from pathlib import Path
from string import Template

from toolchain import run

# JUMPS: how a function of the stand-in goes on in the real one, on each machine
JUMPS = {
    "x86_64": "jmp *slot_$name(%rip)",
    "aarch64": r"adrp x16, slot_$name\n ldr x16, [x16, :lo12:slot_$name]\n br x16",
}
FUNCTION = Template(r"""__attribute__((visibility("hidden"))) void *slot_$name;
__asm__(".globl $name\n.type $name,%function\n$name: $jump\n");
""")
ON_LOAD = Template("""
JNIEXPORT jint JNI_OnLoad(JavaVM *vm, void *reserved) {
    void *library = bionic_load("$folder", "$file");
    if (!library) { fprintf(stderr, "no $file\\n"); abort(); }
$slots
    jint (*load)(JavaVM *, void *) = bionic_symbol(library, "JNI_OnLoad");
    return load ? load(vm, reserved) : JNI_VERSION_1_6;
}
""")
INCLUDES = '#include <jni.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include "loader.h"\n'


def proxy_source(library: Path, machine: str) -> str:
    """The source for one of Android's libraries; its exported Java_* functions are found when it is loaded.

    Args:
        library: Android's.
        machine: as `uname -m` says it, one of JUMPS.
    """
    lines = run(["nm", "-D", "--defined-only", library]).splitlines()
    names = [line.split()[-1].partition("@")[0] for line in lines]
    java = [name for name in names if name.startswith("Java_")]
    slots = "\n".join(f'    slot_{name} = bionic_symbol(library, "{name}");' for name in java)
    on_load = ON_LOAD.substitute(folder=library.parent, file=library.name, slots=slots)
    functions = [FUNCTION.substitute(name=name, jump=Template(JUMPS[machine]).substitute(name=name)) for name in java]
    return INCLUDES + "".join(functions) + on_load
