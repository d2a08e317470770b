"""Make adapters of a bundle with random factors: `random_adapters.py OUT BUNDLE CHECKPOINT`.

They differ in the linears that they change, in their ranks, and in how their factors are stored.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gemma_edge.export.adapter.make import AdapterOptions, make_adapter

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "float16": {"target_modules": EVERYTHING, "r": 3},
    "int8": {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 5},
    "float32": {"target_modules": ["down_proj"], "r": 5},
}


def main(out: Path, bundle: Path, checkpoint: Path) -> None:
    """Make an adapter for each way to store its factors, which is its name."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for seed, (factors, options) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        peft = get_peft_model(
            AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(task_type="CAUSAL_LM", **options)
        )
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:  # the halves B are zero before training
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        with TemporaryDirectory() as folder:
            peft.save_pretrained(folder)
            make_adapter(AdapterOptions(folder, bundle, out / factors, factors=factors, level="none"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
