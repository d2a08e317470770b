"""Quantizes a model's linears with another project's quantizer, in a process of its own, and writes them back as floats.

quality.py starts it with the peer's own interpreter (peers.py installs them), so this file imports nothing of this project.
quality.py puts the floats into the same model and judges them. Every peer uses groups of 32, and its own defaults for all else.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# GROUP: how many weights share a scale.
GROUP = 32
LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")


def hqq(weight: Tensor) -> Tensor:
    """Half-quadratic quantization: zero points are floats."""
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

    codes, meta = Quantizer.quantize(
        weight, nbits=4, group_size=GROUP, axis=1, bitpack=False, device="cpu", compute_dtype=torch.float32
    )
    values: Tensor = Quantizer.dequantize(codes, meta)
    return values


def torchao(weight: Tensor, algorithm: str) -> Tensor:
    """Symmetric int4 by one of torchao's ways to choose a scale."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    choice = IntxChooseQParamsAlgorithm[algorithm]
    int4 = getattr(torch, "int4")  # noqa: B009  # torch's type stubs do not have it
    quantize_(linear, IntxWeightOnlyConfig(int4, granularity=PerGroup(GROUP), intx_choose_qparams_algorithm=choice))
    values: Tensor = linear.weight.dequantize()
    return values


def onnxruntime(weight: Tensor, algorithm: str) -> Tensor:
    """Weights rounded by onnxruntime's own tool: what MatMulNBits multiplies with, found by multiplying the identity."""
    import onnx
    import onnxruntime as ort  # type: ignore[import-untyped]
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as tool  # type: ignore[import-untyped]

    columns, rows = weight.T.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    choices = {
        "rtn": tool.DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False),
        "k_quant": tool.KQuantWeightOnlyQuantConfig(),
    }
    quantizer = tool.MatMulNBitsQuantizer(model, block_size=GROUP, algo_config=choices[algorithm])
    quantizer.process()
    rounded: onnx.ModelProto = getattr(quantizer.model, "model", quantizer.model)
    operators = [node.op_type for node in rounded.graph.node]
    if operators != ["MatMulNBits"]:
        raise RuntimeError(f"onnxruntime's {algorithm} left {operators}")
    session = ort.InferenceSession(rounded.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"x": torch.eye(columns).numpy()})
    return torch.from_numpy(product).T


def q4_0(weight: Tensor) -> Tensor:
    """llama.cpp's Q4_0, by its own Python package."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_0
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def each(rounding: Callable[[Tensor], Tensor], folder: Path, windows: Tensor | None) -> dict[str, Tensor]:
    """Round every linear by itself."""
    from safetensors import safe_open

    rounded = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in filter(LINEAR.fullmatch, shard.keys()):
                rounded[name] = rounding(shard.get_tensor(name).float()).float().contiguous()
    return rounded


def llm_compressor(settings: dict[str, Any], folder: Path, windows: Tensor | None) -> dict[str, Tensor]:
    """GPTQ by llm-compressor, over the whole model."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    if windows is None:
        raise RuntimeError("llm-compressor needs calibration windows")
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    weights = {**scheme, **settings.get("weights", {})}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        actorder=settings["actorder"],
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = windows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    return {n: p.detach().float().contiguous() for n, p in model.named_parameters() if LINEAR.fullmatch(n)}


def auto_round(steps: int, folder: Path, windows: Tensor | None) -> dict[str, Tensor]:
    """Rounding learned by signed gradients, over the whole model."""
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if windows is None:
        raise RuntimeError("AutoRound needs calibration windows")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    with torch.enable_grad():
        changed, _ = AutoRound(
            model,
            tokenizer=tokenizer,
            scheme="W4A16",
            group_size=GROUP,
            iters=steps,
            dataset=data,
            nsamples=len(data),
            seqlen=windows.shape[1],
            device_map="cpu",
        ).quantize()
    return {n: p.detach().float().contiguous() for n, p in changed.named_parameters() if LINEAR.fullmatch(n)}


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    packages: tuple[str, ...]  # the packages whose versions matter; the first one is the peer
    home: str  # its folder, below the folder of all peers
    weight_bits: float  # bits per weight: 4, and a share of the group's scale (16 bits) and zero point
    quantize: Callable[[Path, Tensor | None], dict[str, Tensor]]
    calibrated: bool = False


SYMMETRIC, ASYMMETRIC, FLOAT_ZERO = 4 + 16 / GROUP, 4 + (16 + 4) / GROUP, 4 + (16 + 16) / GROUP
_ORT = ("onnxruntime", "onnx", "onnx-ir")
_COMPRESSOR = ("llmcompressor", "compressed-tensors", "transformers", "torch")
_AUTO_ROUND = ("auto-round", "transformers", "torch")
PEERS = {
    "hqq": Peer(("hqq", "torch"), "quality", FLOAT_ZERO, partial(each, hqq)),
    "ORT k_quant": Peer(_ORT, "quality", ASYMMETRIC, partial(each, partial(onnxruntime, algorithm="k_quant"))),
    "ORT RTN": Peer(_ORT, "quality", ASYMMETRIC, partial(each, partial(onnxruntime, algorithm="rtn"))),
    "GGUF Q4_0": Peer(("gguf",), "quality", SYMMETRIC, partial(each, q4_0)),
    "torchao HQQ_SCALE_ONLY": Peer(
        ("torchao", "torch"), "quality", SYMMETRIC, partial(each, partial(torchao, algorithm="HQQ_SCALE_ONLY"))
    ),
    "torchao AFFINE": Peer(
        ("torchao", "torch"), "quality", SYMMETRIC, partial(each, partial(torchao, algorithm="AFFINE"))
    ),
    "llm-compressor GPTQ": Peer(
        _COMPRESSOR, "llm-compressor", SYMMETRIC, partial(llm_compressor, {"actorder": None}), calibrated=True
    ),
    "llm-compressor GPTQ, actorder static": Peer(
        _COMPRESSOR, "llm-compressor", SYMMETRIC, partial(llm_compressor, {"actorder": "static"}), calibrated=True
    ),
    # AutoRound's default is 200 steps of each layer, its recipe for little time 50.
    "AutoRound": Peer(_AUTO_ROUND, "auto-round", SYMMETRIC, partial(auto_round, 200), calibrated=True),
    "AutoRound, 50 steps": Peer(_AUTO_ROUND, "auto-round", SYMMETRIC, partial(auto_round, 50), calibrated=True),
}


def main() -> None:
    """Write the rounded linears, with the CPU seconds that they took in the file's metadata."""
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--windows", type=Path, help="Safetensors file with the calibration ids under `windows`, (N, T)."
    )
    options = parser.parse_args()
    windows = load_file(options.windows)["windows"] if options.windows else None
    start = time.process_time()
    with torch.no_grad():
        rounded = PEERS[options.peer].quantize(options.model, windows)
    save_file(rounded, options.out, {"cpu_s": str(time.process_time() - start)})


if __name__ == "__main__":
    main()
