"""Write a Gemma folder of a real shape with random weights, as Hugging Face lays it out, in little memory.

Speed and memory depend on the shape only, so benchmarks need no gated download; quality cannot be measured with such a
folder. Matrices have std in_features ** -0.5 and norms deviate by 0.1, so every layer contributes and the softcaps bite.
The same seed gives the same bytes, whatever the number of threads. The tokenizer is synthetic_tokenizer.py's.
"""

from __future__ import annotations

import json
import resource
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from synthetic_tokenizer import GEMMA2, GEMMA3, write_tokenizer
from torch import Tensor

from gemma_edge.bundle.entries import LOCAL
from gemma_edge.model.config import OWN_FIELDS, PRESETS, GemmaConfig
from gemma_edge.model.hub import copy_companions
from gemma_edge.quantize.checkpoint.safetensors_writer import Spec, write_safetensors

SLICE_ELEMENTS = 1 << 23  # 32 MiB of float32 per thread
SHARD_BYTES = 5_000_000_000


SHAPES = {name.removeprefix("gemma2-"): config for name, config in PRESETS.items()}  # Gemma 2's have short names


def shape_of(name: str, layers: int | None) -> GemmaConfig:
    """A preset, cut to its first layers if asked."""
    config = SHAPES[name]
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise click.BadParameter(f"{layers} layers; {name} has 1 to {config.num_hidden_layers}")
    return replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])


def tensor_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order of the published checkpoints."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "mlp.down_proj": (hidden, ffn),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_proj": (q, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    layer = dict(sorted({**layer, **dict.fromkeys(config.norms.names, (hidden,))}.items()))
    if config.qk_norm:
        layer |= dict.fromkeys(("self_attn.k_norm", "self_attn.q_norm"), (config.head_dim,))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def std_of(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a tensor's entries."""
    if name.endswith("norm.weight"):
        return 0.1
    return 0.02 if "embed" in name else float(shape[1] ** -0.5)


def _slice(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(0.0, std, generator=generator).bfloat16()


def random_slices(pool: ThreadPoolExecutor, shape: tuple[int, ...], std: float, seed: int) -> Iterator[Tensor]:
    """Consecutive slices along axis 0, drawn in the pool a few ahead of the writer."""
    rows = max(1, SLICE_ELEMENTS // prod(shape[1:]))
    waiting: deque[Future[Tensor]] = deque()
    for part, start in enumerate(range(0, shape[0], rows)):
        size = (min(rows, shape[0] - start), *shape[1:])
        waiting.append(pool.submit(_slice, size, std, (seed << 20) + part))
        if len(waiting) > 3:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_weights(out: Path, config: GemmaConfig, *, seed: int, threads: int) -> int:
    """Write the shards and their index; return the bytes of all tensors."""
    shapes = tensor_shapes(config)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    seeds = {name: seed * len(shapes) + i for i, name in enumerate(shapes)}
    index: dict[str, str] = {}
    torch.set_num_threads(1)  # the pool's threads are the parallelism
    with ThreadPoolExecutor(threads) as pool:
        for k, names in enumerate(shards):
            file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            index |= dict.fromkeys(names, file)
            draw = {n: partial(random_slices, pool, shapes[n], std_of(n, shapes[n]), seeds[n]) for n in names}
            write_safetensors(out / file, [Spec(n, torch.bfloat16, shapes[n], draw[n]) for n in names])
    total = sum(2 * prod(shape) for shape in shapes.values())
    _dump(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return total


def hf_config(config: GemmaConfig) -> dict[str, Any]:
    """`config.json` as transformers 4 writes it."""
    ropes: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_local_base_freq is not None:
        scaling = {"rope_type": "linear", "factor": config.rope_factor} if config.rope_factor != 1.0 else None
        ropes |= {"rope_local_base_freq": config.rope_local_base_freq, "rope_scaling": scaling}
    return {
        **{key: value for key, value in config.to_json().items() if key not in OWN_FIELDS},
        **ropes,
        "architectures": [config.hf_class],
        "model_type": config.architecture,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar),
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_folder(out: Path, config: GemmaConfig, *, tokenizer: Path | None, seed: int, threads: int) -> int:
    """Write the whole folder; return the bytes of all tensors."""
    out.mkdir(parents=True)
    _dump(out / "config.json", hf_config(config))
    if tokenizer is None:
        write_tokenizer(out, config.vocab_size, {"gemma3_text": GEMMA3}.get(config.architecture, GEMMA2))
    else:
        copy_companions(tokenizer, out)
    special = {"bos_token_id": 2, "eos_token_id": list(config.eos_token_id), "pad_token_id": 0}
    _dump(out / "generation_config.json", {"cache_implementation": "hybrid", **special})
    return write_weights(out, config, seed=seed, threads=threads)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="2b")
@click.option("--layers", type=int, help="Only the first N layers of that shape.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Copy this folder's tokenizer files instead of writing a stand-in.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(out: Path, shape: str, layers: int | None, tokenizer: Path | None, seed: int, threads: int) -> None:
    """Write a random-weight Gemma into OUT."""
    if out.exists():
        raise click.ClickException(f"{out} exists; remove it or name another folder")
    config = shape_of(shape, layers)
    start = time.perf_counter()
    total = write_folder(out, config, tokenizer=tokenizer, seed=seed, threads=threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    local = sum(kind == LOCAL for kind in config.layer_types)
    click.echo(
        f"{out}: Gemma {shape}, {config.num_hidden_layers} layers ({local} local), {config.num_parameters / 1e9:.2f} B"
        f" weights, {total:,} bytes in {time.perf_counter() - start:.0f} s, peak RSS {peak} MiB"
    )


if __name__ == "__main__":
    main()
