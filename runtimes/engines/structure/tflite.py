"""What a `.tflite` file of a bundle may hold. LiteRT follows some offsets and indices unchecked, which can end the process.

Source: TFLite's schema.fbs. Parts that no bundle uses are left out: sparse tensors, external buffers, options with vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path

from gemma_edge.file_hash import remembered
from gemma_edge.runtimes.engines.structure.flatbuffer import Damaged, Schema, Verifier

IDENTIFIER = b"TFL3"
WHOLE = "whole"
SCHEMA: Schema = {
    "Model": ("4", "[OperatorCode]", "[SubGraph]", "s", "[Buffer]", "[4]<Buffer", "[Metadata]", "[SignatureDef]"),
    "OperatorCode": ("1", "s", "4", "4"),
    "SubGraph": ("[Tensor]", "[4]<Tensor", "[4]<Tensor", "[Operator]", "s", "4"),
    "Tensor": ("[4]", "1", "4<Buffer", "s", "Quantization", "1", None, "[4]", "1"),
    "Quantization": ("[4]", "[4]", "[4]", "[8]", "1", "?4", "4"),
    "Blockwise": ("4", "4", "4"),
    "Operator": (
        *("4<OperatorCode", "[4]<Tensor", "[4]<Tensor", "1", "?3", "[1]", "1", "[1]", "[4]<Tensor", "8", "8"),
        *("1", "?11", "4"),
    ),
    "Buffer": ("[1]", "8", "8"),
    "Metadata": ("s", "4<Buffer"),
    "SignatureDef": ("[TensorMap]", "[TensorMap]", "s", None, "4<SubGraph"),
    "TensorMap": ("s", "4<Tensor*"),
    "Reshape": ("[4]",),
    "Squeeze": ("[4]",),
    "FullyConnected": ("1", "1", "1", "1", "1"),
    "Composite": ("s", "4", "[1]", "1", "4"),
    "VarHandle": ("s", "s"),
    "nothing": (),
}
# Kinds of options whose tables hold vectors or other tables. Kinds that no bundle uses must be empty.
UNIONS = {
    "Quantization.5": {1: "nothing", 2: "Blockwise"},
    "Operator.4": {
        **dict.fromkeys((3, 115), "nothing"),
        111: "VarHandle",
        8: "FullyConnected",
        17: "Reshape",
        30: "Squeeze",
    },
    "Operator.12": {**dict.fromkeys((2, 3, 4, 5, 6, 7, 9, 10, 12, 13, 16, 17, 23), "nothing"), 21: "Composite"},
}


class _Model(Verifier):
    lowest = -1

    def check_table(self, name: str, numbers: Mapping[int, int]) -> None:
        """Weights lie behind the flatbuffer, at places that count from the beginning of the file."""
        if name == "Buffer" and numbers.get(1, 0) + numbers.get(2, 0) > self._size:
            raise Damaged("weights lie behind the end of the file")
        if name == "Operator" and (numbers.get(9, 0) + numbers.get(10, 0)) > self._size:
            raise Damaged("options lie behind the end of the file")


def check_model(path: Path) -> None:
    """Follow every offset and index of a model's graph, once for each state of the file.

    Raises:
        Damaged: one leads nowhere.
    """
    remembered("tflite-structure-1", path, _walk, WHOLE)


def _walk(path: Path) -> str:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if data[4:8] != IDENTIFIER:
            raise Damaged("it is not a TFLite model")
        _Model(data, SCHEMA, UNIONS).check("Model")
    return WHOLE
