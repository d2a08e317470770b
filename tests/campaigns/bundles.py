"""Damaged and hostile bundles, opened and run in child processes: refused in one line, or run; never a signal, never more lines.

Half of the bundles are *resealed*: the manifest is made to fit the damaged files, as somebody would who means harm. What such a
bundle computes cannot be distinguished from a model; all others must compute what the whole bundle does, or be refused.

    PYTHONPATH=tests .venv/bin/python -m campaigns.bundles --tries 1000 --seed 7
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from support.checkpoints import DEMO, ROOT
from support.damage import reseal

from campaigns.campaign import Campaign, Hang, main, time_limit
from gemma_edge.bundle.manifest import MANIFEST
from gemma_edge.export.api import export
from gemma_edge.export.options import ExportOptions
from gemma_edge.quantize.options import QuantizeOptions

BACKENDS = (
    "onnx",
    "onnx",
    "executorch",
    "tflite",
)  # the first one has three graphs and a file of weights: half of all tries
SECONDS = 30.0
ODD_NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)


@dataclass(frozen=True)
class Damage:
    """One change of a bundle, which lies in a folder of its own."""

    bundle: Path
    backend: str
    random: random.Random

    def file(self) -> Path:
        """A file of the bundle that its backend reads: mostly one of its own, else any."""
        own = [name for name in OWN[self.backend] if (self.bundle / name).exists()]
        names = own if own and self.random.random() < 0.8 else sorted(path.name for path in self.bundle.iterdir())
        return self.bundle / self.random.choice(names)

    def place(self, size: int) -> int:
        """An offset, mostly near the beginning or the end, where a file says how it is built."""
        near = min(size, 1 << self.random.randrange(4, 18))
        return self.random.choice((self.random.randrange(near), size - 1 - self.random.randrange(near))) if size else 0


OWN = {
    "onnx": ("generate.onnx", "score.onnx", "generate.onnx", "score.onnx", "model.onnx.data"),
    "executorch": ("model.pte",),
    "tflite": ("model.tflite",),
}


def flip(damage: Damage) -> None:
    """A few bytes."""
    path = damage.file()
    data = bytearray(path.read_bytes())
    for _ in range(damage.random.choice((1, 1, 2, 8))):
        data[damage.place(len(data))] ^= damage.random.randrange(1, 256)
    rewrite(path, bytes(data))


def number(damage: Damage) -> None:
    """A word of four or eight bytes, such as a length, an offset or an index, becomes an extreme number."""
    path = damage.file()
    data = bytearray(path.read_bytes())
    for _ in range(damage.random.choice((1, 1, 3))):
        at, size = damage.place(len(data)) & ~3, damage.random.choice((4, 8))
        data[at : at + size] = damage.random.choice(ODD_NUMBERS).to_bytes(size, "little")
    rewrite(path, bytes(data))


def cut(damage: Damage) -> None:
    """Truncated, padded, or emptied."""
    path = damage.file()
    data = path.read_bytes()
    end = damage.place(len(data))
    rewrite(path, damage.random.choice((data[:end], data + bytes(end + 1), b"", data[end:], data + data[:end])))


def splice(damage: Damage) -> None:
    """A part lies over another one, or is blank."""
    path = damage.file()
    data = bytearray(path.read_bytes())
    size = min(len(data), 1 << damage.random.randrange(2, 14))
    here, there = damage.place(len(data) - size + 1), damage.place(len(data) - size + 1)
    data[here : here + size] = damage.random.choice((data[there : there + size], bytes(size), b"\xff" * size))
    rewrite(path, bytes(data))


def graph(damage: Damage) -> None:
    """A graph that is still one: where weights lie, shapes, attributes, inputs of a node. Other backends get a `number`."""
    if damage.backend != "onnx":
        return number(damage)
    path = damage.bundle / damage.random.choice(("generate.onnx", "score.onnx"))
    model, choose = onnx.load(path, load_external_data=False), damage.random.choice
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    attributes = [attribute for node in model.graph.node for attribute in node.attribute if attribute.type == 2]
    what = choose(("external", "external", "dims", "attribute", "attribute", "input", "value"))
    if what == "external" and external:
        entry = choose(choose(external).external_data)
        names = ("../" * 8 + "etc/passwd", "/dev/zero", "nowhere", "score.onnx", "", "x" * 5000)
        entry.value = choose(names) if entry.key == "location" else str(choose((-1, 1 << 62, 1 << 40, *ODD_NUMBERS)))
    elif what == "dims":
        tensor = choose(model.graph.initializer)
        tensor.dims[:] = [choose((*tensor.dims, -1, *ODD_NUMBERS)) for _ in tensor.dims]
    elif what == "attribute":
        choose(attributes).i = choose((-1, -(1 << 40), 1 << 40, *ODD_NUMBERS))
    elif what == "input":
        node = choose([node for node in model.graph.node if node.input])
        node.input[damage.random.randrange(len(node.input))] = choose(choose(model.graph.node).output)
    else:
        value = choose(choose((model.graph.input, model.graph.output)))
        value.type.tensor_type.shape.dim[0].dim_value = choose(ODD_NUMBERS)
    rewrite(path, model.SerializeToString())
    return None


def manifest(damage: Damage) -> None:
    """A value of the manifest."""
    path = damage.bundle / MANIFEST
    data = json.loads(path.read_text())
    at: Any = data
    while True:
        key = damage.random.choice(list(at)) if isinstance(at, dict) else damage.random.randrange(len(at))
        if not (isinstance(at[key], dict | list) and at[key]):
            break
        at = at[key]
    odd: tuple[Any, ...] = (None, -1, 0, 1, 7, 1 << 40, 10**30, "", "../../x", "a\0b", "x" * 5000, [], {}, True, 0.5)
    at[key] = damage.random.choice(odd)
    rewrite(path, json.dumps(data).encode())


def kind(damage: Damage) -> None:
    """Something else lies in a file's place."""
    path = damage.file()
    path.unlink()
    what = damage.random.choice(("nothing", "folder", "pipe", "loop", "outside", "zero"))
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "nothing":
        path.symlink_to({"loop": path, "outside": ROOT / "README.md", "zero": Path("/dev/zero")}[what])


DAMAGES: dict[Callable[[Damage], None], int] = {  # how often each is chosen
    flip: 4,
    number: 4,
    cut: 2,
    splice: 2,
    graph: 5,
    manifest: 2,
    kind: 2,
}


def rewrite(path: Path, data: bytes) -> None:
    """Write a file anew: it may be one with the whole bundle's."""
    path.unlink()
    path.write_bytes(data)


class Worker:
    """A child that opens one bundle after the other; another one takes its place when it ends."""

    def __init__(self, folder: Path) -> None:
        self._errors = folder / "stderr"
        self._process: subprocess.Popen[str] | None = None

    def open(self, bundle: Path, backend: str) -> tuple[str, Any]:
        """The outcome, and the message or the result."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        before = self._errors.stat().st_size
        try:
            with time_limit(SECONDS):
                process.stdin.write(json.dumps({"bundle": str(bundle), "backend": backend}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        except Hang as error:
            self.close()
            return "hang", str(error)
        if not line:
            code = process.wait()
            self.close()
            return "signal", f"exit code {code}: {self._printed(before)[-300:]}"
        reply = json.loads(line)
        if printed := self._printed(before):
            return "traceback", f"on stderr beside {reply['what']}: {printed[:500]}"
        return reply["outcome"], reply["what"]

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "campaigns.bundle_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_WAIT_POLICY": "PASSIVE"},
            )
        return self._process

    def _printed(self, before: int) -> str:
        return self._errors.read_bytes()[before:].decode(errors="replace").strip()


@contextmanager
def place() -> Iterator[Path]:
    """A folder for a campaign, with a cache of its own in it."""
    with TemporaryDirectory() as folder:
        os.environ["GEMMA_EDGE_CACHE"] = str(Path(folder, "cache"))
        yield Path(folder)


def make_bundle(out: Path) -> Path:
    """The demo model in three backends."""
    options = ExportOptions(
        model=str(DEMO),
        out=out,
        quantization=QuantizeOptions(bits=4, group_size=32, method="rtn"),
        context=48,
        prefill_chunk=7,
        kv_bits=32,
        backend=",".join(dict.fromkeys(BACKENDS)),
        verify="none",
    )
    return export(options).bundle


def run(campaign: Campaign, tries: int, whole: Path | None = None) -> None:
    """Damage `whole` again and again; None makes a bundle first."""
    with place() as folder:
        whole = whole or make_bundle(folder / "whole")
        worker = Worker(folder)
        expected = {backend: worker.open(whole, backend) for backend in dict.fromkeys(BACKENDS)}
        for backend, (outcome, what) in expected.items():
            assert outcome == "correct", (backend, what)
        for index in range(tries):
            one_try(campaign, folder / "damaged", whole, worker, expected, BACKENDS[index % len(BACKENDS)])
        worker.close()


def one_try(
    campaign: Campaign, copy: Path, whole: Path, worker: Worker, expected: dict[str, tuple[str, Any]], backend: str
) -> None:
    """Damage a copy, open it, count the outcome."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy, copy_function=os.link)
    (how,) = campaign.random.choices(list(DAMAGES), list(DAMAGES.values()))
    damage = Damage(copy, backend, random.Random(campaign.random.random()))
    how(damage)
    resealed = how is graph or (how not in (manifest, kind) and campaign.random.random() < 0.6)
    if resealed:
        reseal(copy)
    outcome, what = worker.open(copy, backend)
    if outcome == "correct" and not resealed and what != expected[backend][1]:
        outcome = "traceback"
    campaign.tried(outcome, f"{backend} {how.__name__}{' resealed' * resealed}: {what}")


if __name__ == "__main__":
    main("bundles", run, tries=1000)
