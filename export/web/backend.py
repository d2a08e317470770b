"""The backend web: the model for LiteRT.js, with the page and the libraries that run it, all in the bundle's folder.

LiteRT.js computes groups wrongly, so there is one scale per channel. Each signature packs the weights anew in WebAssembly's
memory, of which there are 4 GiB, so there is one signature for prompts and one for answers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.export.backend import TABLE_FIELDS, Configs, Kernels, LoweringTask, StoredWeights
from gemma_edge.export.tflite import packing
from gemma_edge.export.tflite.backend import TFLiteBackend
from gemma_edge.export.tflite.seams import two_signatures
from gemma_edge.export.web.packages import PACKAGES, check_npm, fetched
from gemma_edge.files import sha256
from gemma_edge.model.checkpoint import TABLE, weight_shapes
from gemma_edge.model.config import GemmaConfig
from gemma_edge.runtimes import web
from gemma_edge.runtimes.web.site import LIBRARIES

SITE = (".html", ".js", ".ts")  # suffixes of the files in runtimes/web that a site holds
BARE, RELATIVE = '"@litertjs/wasm-utils"', '"./litert-wasm-utils.js"'  # a worker resolves no names of packages
MATRIX_BITS = (
    1 << 32
)  # what XNNPACK can count where addresses have 32 bits: larger matrices make all logits 0, without an error
COPIES = 3  # of the weights in memory while it starts: the file, and one for each signature


@dataclass(frozen=True)
class WebBackend(TFLiteBackend):
    """A `.tflite` and a static site around it."""

    def refuse_unsupported(self, config: GemmaConfig, configs: Configs, float_bits: int) -> None:
        """See Backend."""
        super().refuse_unsupported(config, configs, float_bits)
        for weight, (rows, columns) in weight_shapes(config).items():
            own = configs[weight]
            bits = rows * columns * (own.bits if own else 32)
            multiplied = weight != TABLE or config.tie_word_embeddings
            if multiplied and bits >= MATRIX_BITS:
                raise InputError(
                    f"{weight} has {bits // 8} bytes: with a matrix of {MATRIX_BITS // 8} or more LiteRT.js computes zeros;"
                    " use `head_bits` 4, or keep a part of the vocabulary (`vocab`)",
                    field=TABLE_FIELDS.get(weight, "bits"),
                    value=bits // rows // columns,
                )
        check_npm()

    def resident_bytes(self, weights: StoredWeights) -> int:
        """See Backend."""
        return COPIES * self.weights_bytes(weights)

    def write(self, task: LoweringTask) -> dict[str, Any]:
        """See Backend."""
        write_site(task.out)
        return super().write(task)


def write_site(out: Path) -> None:
    """Put page and libraries into a folder.

    Raises:
        InputError: a library cannot be fetched.
        RuntimeError: a library is not as expected.
    """
    for file in Path(web.__file__).parent.iterdir():
        if file.suffix in SITE:
            shutil.copyfile(file, out / file.name)
    for package in PACKAGES:
        folder = fetched(package)
        for name in package.files.values():
            shutil.copyfile(folder / name, out / name)
    litert = out / "litert.js"
    litert.write_text(litert.read_text(encoding="utf-8").replace(BARE, RELATIVE), encoding="utf-8")
    for name, expected in LIBRARIES.items():
        if (found := sha256(out / name)) != expected:
            raise RuntimeError(f"{name} has the sha256 {found}: another release than runtimes/web/site.py knows")
    lines = [f"{each.name} {each.version}: {each.licence}\n" for each in PACKAGES]
    (out / "THIRD_PARTY.txt").write_text("Libraries of this site, from npm:\n" + "".join(lines), encoding="utf-8")


BACKEND = WebBackend(
    "web",
    "model.web.tflite",
    Kernels("web", "LiteRT.js", no_groups="LiteRT.js computes them wrongly"),
    packing.LITERT,
    needs={"min_litert": "2.3"},
    signatures=two_signatures,
    group_size=0,
)
