"""Test the library's Maven repository from outside: `test_aar.py REPOSITORY BUNDLE ANSWERS`.

A project that has the repository and the library's coordinates in its POM compiles the example of docs/android.md, and
must answer as Python did.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

from build_aar import GROUP, MODULES, NAMESPACE, version
from toolchain import ANDROID, BUILD, MAVEN, run

CONSUMER = Path(__file__).parent / "consumer"
EXAMPLE = ANDROID / "gemma-onnx" / "src" / "test" / "kotlin" / "com" / "example" / "chat" / "Assistant.kt"
# REQUIRED: what a POM must say before Maven Central takes a library.
REQUIRED = (
    "name",
    "description",
    "url",
    "licenses/license/url",
    "developers/developer/name",
    "scm/connection",
    "scm/url",
)


def check_files(repository: Path, module: str) -> None:
    """Check that a module has its files with checksums, and that its POM is complete.

    Raises:
        SystemExit: something is missing.
    """
    folder = repository / Path(*GROUP.split(".")) / module / version()
    for end in (".pom", ".aar", ".jar", "-sources.jar"):
        if not (folder / f"{module}-{version()}{end}.sha1").is_file():
            raise SystemExit(f"{folder} has no checked {module}-{version()}{end}")
    pom = folder / f"{module}-{version()}.pom"
    root = ElementTree.parse(pom).getroot()
    absent = [path for path in REQUIRED if not root.findtext(NAMESPACE + path.replace("/", f"/{NAMESPACE}"))]
    if absent:
        raise SystemExit(f"{pom} says nothing of {', '.join(absent)}")


def compiled(repository: Path) -> str:
    """Compile the project, and return the class path on which it runs."""
    project = BUILD / "consumer"
    shutil.rmtree(project, ignore_errors=True)
    (project / "src").mkdir(parents=True)
    shutil.copy(CONSUMER / "pom.xml", project)
    for path in (CONSUMER / "Main.kt", EXAMPLE):
        shutil.copy(path, project / "src")
    purge = [
        "-DreResolve=false",
        "dependency:purge-local-repository",
        f"-DmanualIncludes={','.join(f'{GROUP}:{name}' for name in MODULES)}",
    ]
    properties = [f"-Drepository={repository.resolve().as_uri()}", f"-Dsources={project / 'src'}"]
    # Maven keeps a copy of what it took from a repository, here of an earlier build of this version
    run([*MAVEN, "-f", project / "pom.xml", *purge, "compile", *properties])
    return f"{project / 'target' / 'classes'}:{(project / 'target' / 'class-path').read_text(encoding='utf-8')}"


def main(repository: Path, bundle: Path, answers: Path) -> None:
    """Compile the project and compare its answer with Python's.

    Raises:
        SystemExit: a file is missing in the repository, or the answer is another one.
    """
    for module in MODULES:
        check_files(repository, module)
    turn = json.loads(answers.read_text(encoding="utf-8"))["conversation"][0]
    answer = run(["java", "-cp", compiled(repository), "com.example.chat.MainKt", bundle, turn["text"]])
    if not turn["answer"] or not answer.startswith(turn["answer"]):
        raise SystemExit(f"{turn['text']}: Python answers {turn['answer']!r}, the example {answer[:200]!r}")
    print(f"the example of docs/android.md, compiled from {repository}, answers as Python does")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
