"""Static int8 scales of the KV cache, one per channel of K (rotated) and V and layer: collected, stored, and read back.

calibration/layerwise.py chooses the text. The kernels make the codes while generating: round(x / scale) within -128..127.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Shards
from gemma_edge.model.config import GemmaConfig
from gemma_edge.quantize.checkpoint.safetensors_writer import plain_spec, write_safetensors
from gemma_edge.reading import present

KV_FILE = "gemma_edge_kv.safetensors"
KINDS = ("k_scale", "v_scale")
# MARGIN: factor on the largest magnitude in the calibration text. Other text exceeds it, and clipping costs more than coarser
# steps. KL of the cache alone on the demo model, in 1e-5 nats at margins 1.0, 1.1, 1.2, 1.3, 1.5: calibrated on 1k tokens 49, 21,
# 11, 8, 8; on 16k tokens 5, 6, 6, 8, 10.
MARGIN = 1.2
LARGEST_CODE = 127
SMALLEST_SCALE = 2.0**-24

KVScales = dict[int, tuple[Tensor, Tensor]]  # layer -> scales of K and of V, each (K, D) float32


def scale_name(layer: int, kind: str) -> str:
    """The name of a layer's scales in the file and in the graphs; `kind` is one of KINDS."""
    return f"model.layers.{layer}.self_attn.{kind}"


class KVRanges:
    """The largest magnitude of every channel of K and V so far."""

    def __init__(self, largest: Mapping[int, tuple[Tensor, Tensor]] | None = None) -> None:
        self.largest = dict(largest or {})  # by layer: the largest magnitudes of K and of V, (K, D) each

    def add(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take a chunk into account.

        Args:
            layer: index of the layer.
            k, v: (B, K, T, D), k rotated.

        Raises:
            InputError: a value is NaN or infinite.
        """
        new = k.abs().float().amax(dim=(0, 2)), v.abs().float().amax(dim=(0, 2))  # (K, D) each
        for largest, kind in zip(new, "KV", strict=True):
            if not largest.isfinite().all():
                raise InputError(
                    f"{kind} of layer {layer} is NaN or infinite on the calibration text; the weights are damaged"
                )
        self.merge(KVRanges({layer: new}))

    def merge(self, other: KVRanges) -> None:
        """Take what others have seen into account."""
        for layer, new in other.largest.items():
            before = self.largest.get(layer)
            self.largest[layer] = new if before is None else (new[0].maximum(before[0]), new[1].maximum(before[1]))

    def scales(self, margin: float = MARGIN) -> KVScales:
        """Scales that can represent `margin` times the largest magnitude. They are never zero, not even for dead channels."""

        def scale(largest: Tensor) -> Tensor:
            return (largest * (margin / LARGEST_CODE)).clamp(min=SMALLEST_SCALE)

        return {layer: (scale(k), scale(v)) for layer, (k, v) in sorted(self.largest.items())}


def write_kv_scales(folder: Path, scales: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Write the scales of all layers beside a checkpoint's weights."""

    specs = [
        plain_spec(scale_name(layer, kind), values)
        for layer, pair in sorted(scales.items())
        for kind, values in zip(KINDS, pair, strict=True)
    ]
    write_safetensors(folder / KV_FILE, specs)


def read_kv_scales(folder: Path, config: GemmaConfig) -> KVScales | None:
    """The scales beside a checkpoint's weights; None: there are none.

    Raises:
        InputError: the file is damaged, or belongs to another model.
    """
    path = folder / KV_FILE
    if not present(path):
        return None
    shards = Shards(folder, [path])
    shape = (config.num_key_value_heads, config.head_dim)

    def read(layer: int, kind: str) -> Tensor:
        name = scale_name(layer, kind)
        shards.expect(name, shape)
        values = shards.rows(name).float()
        if not (values.isfinite() & (values > 0)).all():
            raise InputError(f"{path}: {name} holds scales that are not positive numbers; calibrate again")
        return values

    return {layer: (read(layer, "k_scale"), read(layer, "v_scale")) for layer in range(config.num_hidden_layers)}
