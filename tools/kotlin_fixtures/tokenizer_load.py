"""Measure how long the Kotlin library takes to load a tokenizer, for the first time in a fresh JVM and again in the same one.

    make android && python tools/kotlin_fixtures/tokenizer_load.py TOKENIZER.JSON [--jvms 10]

This needs a JDK, Maven and the compiled library; `make android` and `make android-test` compile it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "apk"))
from toolchain import ANDROID, MAVEN, class_path, run

GEMMA = ANDROID / "gemma"
# REPEATS: how often the tokenizer is loaded again in the same JVM.
REPEATS = 20
LOAD = """
import java.io.File;
import java.util.Set;

class Load {
    public static void main(String[] arguments) throws Exception {
        for (int i = 0; i < Integer.parseInt(arguments[1]); i++) {
            long start = System.nanoTime();
            gemma.edge.Tokenizer.Companion.open$gemma(new File(arguments[0]), 2, Set.of(1));
            System.out.println((System.nanoTime() - start) / 1e6);
        }
    }
}
"""


@click.command(help=__doc__.splitlines()[0] if __doc__ else "")
@click.argument("tokenizer", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--jvms", default=10, show_default=True, help="Number of fresh JVMs to load the tokenizer in.")
def main(tokenizer: Path, jvms: int) -> None:
    """Compile a small Java program that loads the tokenizer, and run it."""
    if not (GEMMA / "target/classes").is_dir():
        raise click.ClickException("the Kotlin library is not compiled; run make android")
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = folder / "paths"
        goal = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:build-classpath"
        run([*MAVEN, "-f", GEMMA / "pom.xml", goal, f"-Dmdep.outputFile={paths}", "-Dmdep.includeScope=runtime"])
        classes = class_path([folder, GEMMA / "target/classes", Path(paths.read_text().strip())])
        (folder / "Load.java").write_text(LOAD)
        run(["javac", "-cp", classes, "-d", folder, folder / "Load.java"])
        load = ["java", "-cp", classes, "Load", tokenizer]
        fresh = [float(run([*load, 1])) for _ in range(jvms)]
        again = [float(line) for line in run([*load, REPEATS + 1]).split()][1:]
    for label, times in ((f"first time, {jvms} fresh JVMs", fresh), (f"again, {REPEATS} times in one JVM", again)):
        click.echo(f"{label}: median {median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})")


if __name__ == "__main__":
    main()
