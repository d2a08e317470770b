"""The `.tflite` file: the graph, then its weights, streamed from the quantized checkpoint.

Weights lie behind the flatbuffer, which names their places by 64-bit offsets from the start of the file: that lifts its limit of
2 GiB, and only the graph is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flatbuffers
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from gemma_edge.export.tflite.graph import Model
from gemma_edge.export.tflite.packing import Packing
from gemma_edge.model.checkpoint import weight_shapes
from gemma_edge.quantize.checkpoint.store import QuantizedCheckpoint

ALIGNMENT = 64  # of a weight's bytes in the file
DESCRIPTION = "gemma-edge"
IDENTIFIER = b"TFL3"


def write_model(
    model: Model,
    packing: Packing,
    checkpoint: QuantizedCheckpoint,
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a model with the checkpoint's weights. `progress` is called with the bytes just written."""
    sizes = packing.parts(checkpoint.config, checkpoint.configs)
    head, offsets, end = _head(model, sizes)
    with path.open("wb") as file:
        file.write(head)
        for weight, (_, columns) in weight_shapes(checkpoint.config).items():
            widths = packing.row_bytes(checkpoint.configs[weight], columns)
            for part, start, values in packing.packed(checkpoint, weight):
                file.seek(offsets[f"{weight}.{part}"] + start * widths[part])
                progress(file.write(values.numpy().data))
        file.truncate(end)


def _head(model: Model, sizes: dict[str, int]) -> tuple[bytearray, dict[str, int], int]:
    """The flatbuffer, where each weight's part lies behind it, and where the file ends."""
    tree = model.to_flatbuffer(DESCRIPTION)
    places = {name: index for index, name in enumerate(model.buffers) if isinstance(name, str)}
    for index in places.values():
        tree.buffers[index].offset = tree.buffers[index].size = 1  # room for the places
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(tree.Pack(builder), file_identifier=IDENTIFIER)
    head = builder.Output()
    packed_model = schema.Model.GetRootAs(head, 0)
    offsets = {}
    end = len(head)
    for name, size in sizes.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + size
        flatbuffer_utils.update_packed_buffer(packed_model.Buffers(places[name]), offsets[name], size)
    return head, offsets, end
