"""Install the tools that the benchmarks compare against: llama.cpp (built from source), onnxruntime-genai, other quantizers.

Measures nothing itself. llama.cpp comes from the source package of llama-cpp-python, which vendors it; it is built for this
machine's own instruction set, with OpenMP and without BLAS, so it is as fast here as its authors meant it to be. Each peer
lives in its own folder and virtual environment; delete the folder to be rid of it. Needs uv, a C++ compiler and 6 GB of disk.
"""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from measure import machine

LLAMA_CPP_PYTHON = "0.3.36"
GENAI = "0.18.0"
TORCH = "torch>=2.13,<2.14"
CONVERT_PACKAGES = (
    TORCH,
    "numpy>=2,<2.5",
    "sentencepiece",
    "protobuf",
    "transformers>=5.10,<6",
    "pyyaml",
    "requests",
    "tqdm",
)
GENAI_PACKAGES = (
    f"onnxruntime-genai=={GENAI}", TORCH, "onnxruntime>=1.29,<2", "onnx", "onnx-ir", "transformers>=5.10,<6",
    "sentencepiece", "protobuf",
)  # fmt: skip
# What quality.py and smollm2.py run: quantizers that live together, and one that needs versions of its own.
QUANTIZERS = {
    "quality": (
        TORCH, "numpy>=2,<2.5", "hqq==0.2.8.post1", "torchao==0.18.0", "gguf>=0.19", "onnxruntime==1.32.0", "onnx", "onnx-ir",
        "transformers>=5.10,<6", "accelerate", "safetensors", "click", "pip",
    ),
    "llm-compressor": (TORCH, "llmcompressor==0.14.0.1"),
    "auto-round": (TORCH, "auto-round==0.16.1"),
}  # fmt: skip
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",  # -O3
    "-DGGML_NATIVE=ON",  # -march=native
    "-DGGML_OPENMP=ON",
    "-DGGML_BLAS=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(frozen=True)
class LlamaCpp:
    """Where llama.cpp's parts lie in a folder of peers."""

    root: Path

    @property
    def python(self) -> Path:
        """Interpreter with the converter's packages."""
        return self.root / "llama-cpp/venv/bin/python"

    @property
    def source(self) -> Path:
        """llama.cpp's source tree."""
        return self.root / f"llama-cpp/llama_cpp_python-{LLAMA_CPP_PYTHON}/vendor/llama.cpp"

    @property
    def convert(self) -> Path:
        """Script that turns a Hugging Face folder into a GGUF file."""
        return self.source / "convert_hf_to_gguf.py"

    @property
    def quantize(self) -> Path:
        """Binary that turns a bf16 GGUF file into a 4-bit one."""
        return self.root / "llama-cpp/build/bin/llama-quantize"

    @property
    def imatrix(self) -> Path:
        """Binary that finds out which columns matter."""
        return self.root / "llama-cpp/build/bin/llama-imatrix"

    @property
    def perplexity(self) -> Path:
        """Binary that compares a file's logits with those of another."""
        return self.root / "llama-cpp/build/bin/llama-perplexity"

    @property
    def bench(self) -> Path:
        """Its own benchmark."""
        return self.root / "llama-cpp/build/bin/llama-bench"

    @property
    def ready(self) -> bool:
        """Whether all of it is installed."""
        binaries = (self.quantize, self.imatrix, self.perplexity, self.bench)
        return all(path.is_file() for path in (self.python, self.convert, *binaries))


@dataclass(frozen=True)
class Genai:
    """Where onnxruntime-genai lies in a folder of peers."""

    root: Path

    @property
    def python(self) -> Path:
        """Interpreter with onnxruntime-genai and its model builder."""
        return self.root / "genai/venv/bin/python"

    @property
    def ready(self) -> bool:
        """Whether it is installed."""
        return any(self.root.glob("genai/venv/lib/python*/site-packages/onnxruntime_genai"))


def how_to_install(root: Path | None, name: str) -> str:
    """The hint for a user who lacks a peer."""
    return f"not installed: python tools/benchmarks/peers.py {root or 'FOLDER'} --only {name}"


def _run(command: Sequence[str | Path]) -> None:
    click.echo("+ " + " ".join(str(part) for part in command))
    subprocess.run([str(part) for part in command], check=True)


def _venv(folder: Path, packages: Sequence[str]) -> Path:
    python = folder / "bin/python"
    if not python.exists():
        _run(["uv", "venv", "--quiet", "--python", "3.11", folder])
    _run(["uv", "pip", "install", "--quiet", "--python", python, *packages])
    return python


def install_llama_cpp(root: Path, *, jobs: int) -> LlamaCpp:
    """Download, build and equip llama.cpp below `root`."""
    peer = LlamaCpp(root)
    base = root / "llama-cpp"
    base.mkdir(parents=True, exist_ok=True)
    python = _venv(base / "venv", (*CONVERT_PACKAGES, "cmake", "ninja", "pip"))
    archive = base / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
    if not archive.exists():
        # uv has no download command; pip's builds the metadata too, which takes most of its minute.
        pin = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        _run([python, "-P", "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", pin, "-d", base])
    if not peer.convert.exists():
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 of Debian 12 has none
            tar.extractall(base)
    binaries = python.parent
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={(binaries / 'ninja').absolute()}")
    _run([binaries / "cmake", "-S", peer.source, "-B", base / "build", *generator, *CMAKE_OPTIONS, *_without_amx()])
    targets = ("--target", "llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")
    _run([binaries / "cmake", "--build", base / "build", "--parallel", str(jobs), *targets])
    return peer


def _without_amx() -> list[str]:
    """Options that leave out AMX, whose kernels crash in this version (llama-bench, Q4_1, in ggml_backend_amx_mul_mat)."""
    if "amx_int8" not in machine()["flags"]:
        return []
    return [f"-DCMAKE_{language}_FLAGS=-mno-amx-int8 -mno-amx-tile -mno-amx-bf16" for language in ("C", "CXX")]


def install_genai(root: Path) -> Genai:
    """Install onnxruntime-genai and what its model builder needs below `root`."""
    _venv(root / "genai/venv", GENAI_PACKAGES)
    return Genai(root)


def install(root: Path, name: str, *, jobs: int) -> bool:
    """Install one peer below `root`; return whether it is ready."""
    if name == "llama-cpp":
        return install_llama_cpp(root, jobs=jobs).ready
    if name == "genai":
        return install_genai(root).ready
    return _venv(root / name / "venv", QUANTIZERS[name]).exists()


PEERS = ("llama-cpp", "genai", *QUANTIZERS)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--only", type=click.Choice(PEERS), multiple=True, help="Install only this peer; repeatable.")
@click.option("--jobs", default=2, show_default=True, help="Number of compiler processes at once.")
def main(folder: Path, only: tuple[str, ...], jobs: int) -> None:
    """Install the peers into FOLDER."""
    for name in only or PEERS:
        ready = install(folder, name, jobs=jobs)
        click.echo(f"{name}: {'ready' if ready else 'incomplete'} in {folder / name}")


if __name__ == "__main__":
    main()
