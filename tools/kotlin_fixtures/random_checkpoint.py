"""Write a random checkpoint of a small, unusual shape: `random_checkpoint.py OUT [PRESET]`, where the preset says which Gemma.

Its sliding windows are full after eight tokens.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from synthetic import write_folder

from gemma_edge.model.config import PRESETS

LAYERS = 3


def main(out: Path, name: str = "gemma2-2b") -> None:
    """Write the checkpoint into a new folder; an older one is removed first."""
    preset = PRESETS[name]
    config = replace(
        preset,
        vocab_size=1500,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=8,
        max_position_embeddings=64,
        layer_types=PRESETS["gemma2-2b"].layer_types[:LAYERS],
    )
    shutil.rmtree(out, ignore_errors=True)
    write_folder(out, config, tokenizer=None, seed=0, threads=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
