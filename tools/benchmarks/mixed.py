"""The tables of docs/export/mixed-precision.md: how well the sensitivity ranks, and what mixed precision gains.

    python tools/benchmarks/mixed.py rank demo/tiny-gemma2
    python tools/benchmarks/mixed.py gain demo/tiny-gemma2 --quality balanced

KL to the float model is that of torch on held-out text. `rank` holds the whole model in memory: for small ones.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from gemma_edge.export.api import open_model
from gemma_edge.export.options import ExportOptions
from gemma_edge.model.checkpoint import Checkpoint, Weights
from gemma_edge.model.gemma import Gemma
from gemma_edge.progress import no_progress
from gemma_edge.quantize.api import Quantization, make_checkpoint
from gemma_edge.quantize.calibration import text as calibration
from gemma_edge.quantize.calibration.block import gemma_topology, second_moments
from gemma_edge.quantize.calibration.gptq import Inputs, output_error, quantize_outputs
from gemma_edge.quantize.calibration.windows import runner
from gemma_edge.quantize.mixed import sensitivity
from gemma_edge.quantize.mixed.choose import TOKENS
from gemma_edge.quantize.options import CalibrationText, QuantizeOptions
from gemma_edge.quantize.recipe import QuantConfig, default_method
from gemma_edge.text import corpus

HELD_OUT = tuple(Path(corpus.__file__).parent / "data" / name for name in corpus.HELD_OUT)
RANKED = (QuantConfig(4, 0), QuantConfig(4, 32))
GROUPS = (0, 128, 32)


def held_out(source: Checkpoint, tokens: int) -> Tensor:
    """(N, T) int64."""
    config, text = source.config, CalibrationText(paths=HELD_OUT, tokens=tokens)
    return calibration.windows(source.folder, config.bos_token_id, config.max_position_embeddings, text)


def streams(source: Checkpoint, model: Gemma, x: Tensor, first: int = 0) -> list[Tensor]:
    """What enters every block from `first` on, and what leaves the last: (N, T, hidden) each."""
    found = [x]
    for layer in range(first, source.config.num_hidden_layers):
        run = runner(source, layer, x.shape[1])
        found.append(torch.cat([run(model.model.layers[layer], window) for window in torch.split(found[-1], 1)]))
    return found


def embedded(model: Gemma, ids: Tensor) -> Tensor:
    """(N, T) -> (N, T, hidden)."""
    found: Tensor = model.model.embed_tokens(ids) * model.config.hidden_size**0.5
    return found


def log_p(model: Gemma, x: Tensor) -> Tensor:
    """(N, T, hidden) after the last block -> (N, T, V)."""
    return model.head(model.model.norm(x)).log_softmax(-1)


def kl(right: Tensor, said: Tensor) -> float:
    """Nats per token."""
    return float((right.exp() * (right - said)).sum(-1).mean())


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@click.group()
def main() -> None:
    """See the head of this file."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", default=2048, show_default=True, help="Held-out tokens.")
@torch.no_grad()
def rank(folder: Path, tokens: int) -> None:
    """Every linear rounded by itself, by GPTQ: measured KL against three predictions."""
    source = Checkpoint.open(folder)
    config, model, topology = source.config, source.load(), gemma_topology(source.config)
    windows = calibration.windows(
        folder, config.bos_token_id, config.max_position_embeddings, CalibrationText(tokens=TOKENS)
    )
    with tempfile.TemporaryDirectory() as work:
        measured = sensitivity.measure(source, windows, lambda c: default_method(c, "balanced"), Path(work))
    seen, judged = (streams(source, model, embedded(model, ids)) for ids in (windows, held_out(source, tokens)))
    right = log_p(model, judged[-1])
    rows: list[tuple[float, float, float, float]] = []
    for layer in range(config.num_hidden_layers):
        block, run = model.model.layers[layer], runner(source, layer, windows.shape[1])
        moments = second_moments(block, seen[layer], run, topology)
        for site in topology.sites:
            inputs = Inputs.from_hessian(moments[site[0]])
            for name in site:
                weight = block.get_parameter(f"{name}.weight").data
                original = weight.clone()
                whole = output_error(original, inputs, torch.zeros_like(original)).sum()
                for option in RANKED:
                    rounded = quantize_outputs(original, inputs, option.fit(weight.shape[1])).dequantize()
                    weight.copy_(rounded)
                    found = kl(right, log_p(model, streams(source, model, judged[layer], layer)[-1]))
                    changed = run(block, seen[layer][:1]) - seen[layer + 1][:1]
                    weight.copy_(original)
                    error = output_error(original, inputs, rounded).sum()
                    predicted = measured[f"model.layers.{layer}.{name}"][option.fit(weight.shape[1])]
                    part = changed.square().sum() / seen[layer + 1][:1].square().sum()
                    rows.append((found, float(error / whole), float(part), predicted))
    kls, *guesses = (list(column) for column in zip(*rows, strict=True))
    for what, guess in zip(
        ("error of the linear's output", "change of the block's output", "ours"), guesses, strict=True
    ):
        print(f"| {what} | {spearman(kls, guess):.2f} |")
    ratio = (torch.tensor(guesses[-1]) / torch.tensor(kls)).log()
    print(
        f"{len(rows)} roundings; ours / measured: {ratio.mean().exp():.2f}, times or divided by {ratio.std().exp():.2f}"
    )


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tokens", default=4096, show_default=True, help="Held-out tokens.")
@click.option("--quality", default="balanced", show_default=True)
def gain(folder: Path, tokens: int, quality: str) -> None:
    """One configuration for all linears against mixed precision in a weights file of the same size."""
    source, base = Checkpoint.open(folder), QuantizeOptions(quality=quality)
    ids = held_out(source, tokens)
    right = logits(source, source, ids)

    def row(options: QuantizeOptions) -> int:
        opened = open_model(ExportOptions(model=str(folder), quantization=options))
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "checkpoint"
            quantized, _ = make_checkpoint(
                Quantization(options, source, opened.recipe, opened.calibration), out, no_progress, []
            )
            found = kl(right, logits(source, quantized, ids))
        predicted = f"{opened.choice.predicted_kl:.5f}" if opened.choice else ""
        print(
            f"| {opened.recipe.name} | {opened.plans['onnx'].weights_bytes} | {found:.5f} | {predicted} |", flush=True
        )
        return opened.plans["onnx"].weights_bytes

    for group_size in GROUPS:
        size = row(replace(base, group_size=group_size))
        row(replace(base, size=str(size)))


@torch.no_grad()
def logits(source: Checkpoint, weights: Weights, ids: Tensor) -> Tensor:
    """Log-probabilities (N, T, V) of a model's weights, which may be its integers dequantized."""
    model = weights.load()
    return log_p(model, streams(source, model, embedded(model, ids))[-1])


if __name__ == "__main__":
    main()
