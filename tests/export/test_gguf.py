"""`gemma-export MODEL.gguf`: the same weights file as from a Hugging Face folder of the same values.

The files are written by the gguf package's own writer, with the names and values that llama.cpp's converter gives them.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import DEMO, ROOT, SHAPES, make_checkpoint
from support.commands import refused, run
from tokenizers import Tokenizer
from torch import Tensor
from transformers.convert_slow_tokenizer import generate_merges

from gemma_edge.bundle.entries import LOCAL
from gemma_edge.errors import InputError
from gemma_edge.model.checkpoint import Checkpoint, norm_names, weight_shapes
from gemma_edge.model.config import PRESETS, GemmaConfig
from gemma_edge.model.families import GEMMA2
from gemma_edge.model.gguf.config import KEYS, config_json
from gemma_edge.model.gguf.folder import prepare
from gemma_edge.model.gguf.reader import FLOAT_TYPES, TYPES, Header
from gemma_edge.model.gguf.tensors import OTHERS, GgufFile, block_names
from gemma_edge.model.gguf.tokenizer import merges
from gemma_edge.model.hub import COMPANIONS

gguf = pytest.importorskip("gguf")

FAST = (
    "--bits",
    "4",
    "--group-size",
    "32",
    "--method",
    "rtn",
    "--kv-bits",
    "32",
    "--context",
    "64",
    "--verify",
    "none",
)
LLAMA = {name: each for each, name in OTHERS.items()}
RAW = json.loads((DEMO / "tokenizer.json").read_text())
PIECES = sorted(RAW["model"]["vocab"], key=RAW["model"]["vocab"].get)
BYTES = range(7, 263)  # the demo's tokens for single bytes


def llama_name(name: str, config: GemmaConfig) -> str:
    """llama.cpp's name of a tensor of a Hugging Face folder."""
    if not name.startswith("model.layers."):
        return LLAMA[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    llama = {ours: each for each, ours in block_names(config.norms).items()}
    return f"blk.{layer}.{llama[part]}.weight"


# llama.cpp's names of the architectures, by transformers'
LLAMA_ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}


def kinds() -> list[int]:
    """llama.cpp's types of the demo's tokens."""
    added = {token["id"]: 3 if token["special"] else 4 for token in RAW["added_tokens"]}
    return [added.get(i, 6 if i in BYTES else 1) for i in range(len(PIECES))]


def scores() -> list[float]:
    """As llama.cpp stores them: -1000 for what is no piece of text."""
    return [-float(i - BYTES.stop) if kind == 1 else 0.0 if kind == 6 else -1000.0 for i, kind in enumerate(kinds())]


def write(folder: Path, path: Path, kind: str = "F16", *, skip: tuple[str, ...] = (), **changed: Any) -> Path:
    """A GGUF file of a Hugging Face folder: matrices of one type, norms as float32 and 1 larger.

    Args:
        folder: the model's.
        path: the file.
        kind: the matrices' type.
        skip: keys of the metadata to leave out.
        changed: values of metadata, with `__` for a point.
    """
    config, weights = GemmaConfig.from_hf(folder), load_file(folder / "model.safetensors")
    name = LLAMA_ARCHITECTURES[config.architecture]
    values: dict[str, Any] = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": scores(),
        "tokenizer.ggml.token_type": kinds(),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"],
    }
    if LOCAL in config.layer_types:
        values |= {
            f"{name}.attention.sliding_window": config.sliding_window,
            f"{name}.rope.freq_base_swa": config.rotary(config.layer_types.index(LOCAL)).theta,
            f"{name}.attention.sliding_window_pattern": [each == LOCAL for each in config.layer_types],
        }
    if config.attn_logit_softcapping is not None:
        values[f"{name}.attn_logit_softcapping"] = config.attn_logit_softcapping
        values[f"{name}.final_logit_softcapping"] = config.final_logit_softcapping
    if config.rope_factor != 1:
        values |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": config.rope_factor}
    values |= {key.replace("__", "."): value for key, value in changed.items()}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", name))
    for key, value in values.items():
        if key not in skip:
            add(writer, key, value)
    for tensor, stored in weights.items():
        add_tensor(writer, llama_name(tensor, config), stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    """One pair of metadata, in the type that llama.cpp writes."""
    kinds = {str: "string", int: "uint32", float: "float32", list: "array", bool: "bool"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def add_tensor(writer: Any, name: str, stored: Tensor, kind: str) -> None:
    values = stored.float().numpy()
    kind = "F32" if "norm" in name else kind
    quantized = gguf.quants.quantize(values + 1 if "norm" in name else values, gguf.GGMLQuantizationType[kind])
    writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType[kind])


def dequantized(folder: Path, out: Path, kind: str) -> Path:
    """A Hugging Face folder whose matrices hold what a type of GGUF's can hold, as float32 or as the float type itself."""
    shutil.copytree(folder, out)
    weights = load_file(folder / "model.safetensors")
    quant, dtype = (
        gguf.GGMLQuantizationType[kind],
        {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32),
    )
    for name, stored in weights.items():
        if "norm" not in name:
            values = gguf.dequantize(gguf.quants.quantize(stored.float().numpy(), quant), quant)
            weights[name] = torch.from_numpy(values.copy()).to(dtype)
        else:
            weights[name] = stored.float() + 1 - 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def weights_files(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle that is neither its manifest nor about text."""
    other = {"manifest.json", *COMPANIONS}
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file() and path.name not in other}


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_bundle_is_the_same_as_from_a_folder_of_the_same_values(kind: str, tmp_path: Path) -> None:
    folder, file = dequantized(DEMO, tmp_path / "hf", kind), write(DEMO, tmp_path / "model.gguf", kind)
    first, second = run(folder, "-o", tmp_path / "one", *FAST), run(file, "-o", tmp_path / "two", *FAST)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    one, two = weights_files(tmp_path / "one"), weights_files(tmp_path / "two")
    assert one == two and sum(map(len, one.values())) > 1 << 20
    line = f"warning: {file}: its weights are quantized already (Q8_0 x 43), and integers are made from these"
    assert (line in second.stderr) == (kind == "Q8_0")
    stops = [
        json.loads((tmp_path / name / "manifest.json").read_text())["config"]["eos_token_id"] for name in ("one", "two")
    ]
    assert stops[0] == stops[1]


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("shape", ["tiny", "gemma3", "gemma3_scaled", "untied", "gemma1"])
def test_every_tensor_and_key_equals_the_folders(kind: str, shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", **{**SHAPES[shape], "vocab_size": 4096, "query_pre_attn_scalar": 32})
    scalar = GemmaConfig.from_hf(model).head_dim  # llama.cpp stores none: it is head_dim, but in the 27B sizes
    raw = json.loads((model / "config.json").read_text()) | {"query_pre_attn_scalar": scalar, "eos_token_id": [1, 5]}
    (model / "config.json").write_text(json.dumps(raw))
    (model / "generation_config.json").unlink()
    expected = Checkpoint.open(dequantized(model, tmp_path / "hf", kind))
    actual = Checkpoint.open(prepare(write(model, tmp_path / "model.gguf", kind)))
    assert actual.config == expected.config
    for name in weight_shapes(expected.config):
        assert torch.equal(actual.matrix(name), expected.matrix(name)), name
        assert torch.equal(actual.rows(name, 3, 5), expected.rows(name, 3, 5)), name
        assert actual.dtype(name) == expected.dtype(name)
    for name in norm_names(expected.config):
        assert torch.equal(actual.vector(name), expected.vector(name)), name


@pytest.mark.parametrize("preset", PRESETS)
def test_metadata_of_every_size_gives_its_configuration(preset: str, tmp_path: Path) -> None:
    """Keys as llama.cpp's converter writes them: no pattern, no base of local layers, and no scale of attention."""
    config = PRESETS[preset]
    name = LLAMA_ARCHITECTURES[config.architecture]
    metadata: dict[str, Any] = {
        f"{name}.{key}": getattr(config, ours)
        for key, ours in KEYS.items()
        if ours != "sliding_window" or LOCAL in config.layer_types
    }
    metadata |= {"general.architecture": name, f"{name}.rope.freq_base": config.rope_theta}
    metadata |= {
        f"tokenizer.ggml.{key}_token_id": stop for key, stop in zip(("eos", "eot"), config.eos_token_id, strict=False)
    }
    metadata[f"{name}.attention.layer_norm_rms_epsilon"] = float(np.float32(1e-6))
    if config.rope_factor != 1:
        metadata |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": config.rope_factor}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tables = {"token_embd.weight": (config.vocab_size, config.hidden_size)}
    raw = config_json(tmp_path / "model.gguf", Header(metadata, {}, ()), tables)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert GemmaConfig.from_hf(tmp_path) == config


def test_an_adapter_is_merged_into_a_gguf_file(tmp_path: Path) -> None:
    name, draw = "model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    model = make_checkpoint(tmp_path / "model", vocab_size=4096)
    halves = {"lora_A": (4, 64), "lora_B": (128, 4)}
    (tmp_path / "lora").mkdir()
    save_file(
        {
            f"base_model.model.{name}.{half}.weight": torch.randn(shape, generator=draw)
            for half, shape in halves.items()
        },
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    expected = Checkpoint.open(dequantized(model, tmp_path / "hf", "Q8_0"), lora=tmp_path / "lora")
    folder = prepare(write(model, tmp_path / "model.gguf", "Q8_0"))
    merged = Checkpoint.open(folder, lora=tmp_path / "lora").matrix(name)
    assert torch.equal(merged, expected.matrix(name))
    assert not torch.equal(merged, Checkpoint.open(folder).matrix(name))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FLOAT_TYPES])
def test_rows_are_the_packages_own(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes, because the package quantizes only some of the types."""
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    stored = np.random.default_rng(0).integers(0, 256, (40, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "gemma2")
    writer.add_tensor("blk.0.attn_q.weight", stored, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, name = GgufFile(tmp_path / "file.gguf", GEMMA2.norms), "model.layers.0.self_attn.q_proj.weight"
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(stored, quant))
    assert file.tensors[name].shape == (40, 2 * block) and file.tensors[name].dtype == "F32"
    assert torch.equal(file.rows(name).nan_to_num(), expected.nan_to_num())
    assert torch.equal(file.rows(name, 7, 20).nan_to_num(), expected[7:20].nan_to_num())


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    folder = prepare(write(DEMO, tmp_path / "model.gguf"))
    ours, theirs = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (folder, DEMO))
    lines = [
        line for path in sorted((ROOT / "docs").rglob("*.md")) for line in path.read_text().splitlines(keepends=True)
    ]
    lines += [
        "",
        "a   b\t\tc\n\n",
        "<start_of_turn>user\nHi<end_of_turn>\n",
        "\u00e9\u4f60\U0001f600",
        "<bos>a",
        "\u2581\u2581 x",
    ]
    assert len(lines) > 1000
    for line in lines:
        assert ours.encode(line).ids == theirs.encode(line).ids, line
        assert ours.decode(ours.encode(line).ids) == theirs.decode(theirs.encode(line).ids)
    assert (folder / "chat_template.jinja").read_text() == json.loads((DEMO / "tokenizer_config.json").read_text())[
        "chat_template"
    ]


def test_merges_are_those_of_transformers() -> None:
    """Runs of blanks among them: they are the user's own pieces, whose merges come before all others."""
    pieces = [*PIECES, *("\u2581" * length for length in range(2, 9))]
    kind, given = [*kinds(), *[4] * 7], [*scores(), *[-1000.0] * 7]
    # SentencePiece's scores, which transformers reads
    triples = zip(pieces, given, kind, strict=True)
    originals = {piece: 0.0 if each in (3, 4) else score for piece, score, each in triples}
    expected = generate_merges({piece: i for i, piece in enumerate(pieces)}, originals)
    assert merges(pieces, given, kind) == expected
    assert expected[0] == ("\u2581" * 7, "\u2581")


def test_a_split_file_is_read_by_any_of_its_parts(tmp_path: Path) -> None:
    whole = Checkpoint.open(prepare(write(DEMO, tmp_path / "model.gguf")))
    paths = split(whole, tmp_path)
    for path in paths:
        part = Checkpoint.open(prepare(path))
        assert part.config == whole.config and part.files() == paths
        for name in weight_shapes(whole.config):
            assert torch.equal(part.rows(name, 0, 8), whole.rows(name, 0, 8))
    paths[1].unlink()
    refused(run(paths[0], "-o", tmp_path / "out", *FAST), f"{tmp_path} has no {paths[1].name}")
    shutil.copy(paths[0], paths[1])
    refused(run(paths[0], "-o", tmp_path / "out", *FAST), "is part 0 of 2 by its metadata, but 1 of 2 by its name")


def split(whole: Checkpoint, folder: Path) -> list[Path]:
    """The demo in two files, as llama.cpp's gguf-split writes them."""
    weights = load_file(DEMO / "model.safetensors")
    half = len(weights) // 2
    paths = []
    for number, names in enumerate((list(weights)[:half], list(weights)[half:])):
        model = folder / f"part{number}"
        shutil.copytree(DEMO, model)
        save_file({name: weights[name] for name in names}, model / "model.safetensors")
        path = folder / f"tiny-{number + 1:05}-of-00002.gguf"
        paths.append(write(model, path, split__no=number, split__count=2, split__tensors__count=len(weights)))
    return paths


MORE: tuple[tuple[str, list[Any], Any], ...] = (
    ("tokens", PIECES, "one more"),
    ("scores", scores(), 0.0),
    ("token_type", kinds(), 1),
)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"general__architecture": "llama"},
        'general.architecture is "llama"; supported: "gemma", "gemma2", "gemma3"',
    ),
    "a key is missing": ({"skip": ("gemma2.block_count",)}, "has no gemma2.block_count"),
    "tokenizer": ({"tokenizer__ggml__model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
    "no tokens": ({"skip": ("tokenizer.ggml.tokens",)}, "has no tokenizer.ggml.tokens, or of another type"),
    "few scores": ({"tokenizer__ggml__scores": [0.0]}, "4096 tokens, 1 scores and 4096 types"),
    "a byte without a token": (
        {"tokenizer__ggml__tokens": [piece.replace("<0x41>", "<0xxx>") for piece in PIECES]},
        "has no token for the byte <0x41>",
    ),
    "a token twice": ({"tokenizer__ggml__tokens": [*PIECES[:-1], PIECES[9]]}, "a token stands twice"),
    "a score that is no number": (
        {"tokenizer__ggml__scores": [*scores()[:-1], float("nan")]},
        "score is NaN or infinite",
    ),
    "more tokens than rows": (
        {f"tokenizer__ggml__{key}": [*values, last] for key, values, last in MORE},
        "has 4097 tokens, but its table has 4096 rows",
    ),
    "bos": ({"tokenizer__ggml__bos_token_id": 4096}, "tokenizer.ggml.bos_token_id is 4096, but there are 4096 tokens"),
    "long template": (
        {"tokenizer__chat_template": "x" * (1 << 19)},
        "tokenizer.chat_template is not a text of at most",
    ),
    "a size of 0": ({"gemma2__embedding_length": 0}, "model.gguf, as a config.json: hidden_size"),
    "a size that differs": ({"gemma2__embedding_length": 128}, "config.json asks for"),
    "a size that is a text": (
        {"gemma2__attention__head_count": "8"},
        "model.gguf, as a config.json: num_attention_heads",
    ),
    "unknown scaling": ({"gemma2__rope__scaling__type": "yarn"}, 'rope_type is "yarn"'),
    "a list for a text": ({"gemma2__rope__scaling__type": [1, 2]}, "rope_type is a list"),
    "a list for a number": ({"split__count": [1, 2]}, "is part 0 of [1, 2] by its metadata"),
    "texts for scores": ({"tokenizer__ggml__scores": PIECES}, "has no tokenizer.ggml.scores, or of another type"),
    "pattern": ({"gemma2__attention__sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "another part": ({"split__count": 2, "split__no": 0}, "is part 0 of 2 by its metadata, but 0 of 1 by its name"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_a_gemma_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changed, message = REFUSALS[case]
    result = run("plan", write(DEMO, tmp_path / "model.gguf", **changed))
    refused(result, message, str(tmp_path / "model.gguf"))
    refused(run("plan", tmp_path / "model.gguf"), message)  # nothing that was left in the cache makes it pass


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf")
    place = GgufFile(path, GEMMA2.norms)._header.tensors["token_embd.weight"]
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 8 * len(place.shape)
    for number, name in ((16, "IQ2_XXS"), (24, "I8"), (999, "of the unknown type 999")):
        path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        refused(run("plan", path), f"{path}: tensor token_embd.weight is {name}; supported: F32, F16, BF16, Q4_0")


def test_infinite_values_are_refused(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf", "Q8_0")
    place = GgufFile(path, GEMMA2.norms)._header.tensors["blk.0.attn_q.weight"]
    data = bytearray(path.read_bytes())
    data[place.start : place.start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    refused(run(path, "-o", tmp_path / "out", *FAST), str(path), "self_attn.q_proj.weight holds NaN or infinite values")
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(DEMO, tmp_path / "model.gguf")
    weights = Checkpoint.open(prepare(path))
    path.write_bytes(path.read_bytes() + b"1")
    with pytest.raises(InputError, match="was changed while it was read; export again"):
        weights.matrix("model.layers.0.self_attn.q_proj")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(DEMO, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(run("plan", path), "reading GGUF files needs the package gguf: pip install 'gemma-edge[gguf]'")
    refused(run("plan", tmp_path / "other.gguf"), "gguf")


def mutated(data: bytes, header: int, draw: random.Random) -> bytes:
    """Damage: mostly to the header, where sizes and types are; now and then the file ends early."""
    if draw.random() < 0.1:
        return data[: draw.randrange(len(data))]
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(header if draw.random() < 0.9 else len(data)), draw.choice((1, 4, 8))
        out[at : at + size] = draw.choice((b"\xff" * size, b"\0" * size, draw.randbytes(size)))[: len(out) - at]
    return bytes(out)


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_one_line_or_harmless(seed: int, small: Path, tmp_path: Path) -> None:
    """Damage to a number of a tensor or to a letter of a token passes; all other damage is one line."""
    draw, data = random.Random(seed), small.read_bytes()
    places = GgufFile(small, GEMMA2.norms)._header.tensors.values()
    path = tmp_path / "model.gguf"
    path.write_bytes(mutated(data, min(place.start for place in places), draw))
    result = run("quantize", path, "-o", tmp_path / "out", *FAST[:6])
    if result.exit_code:
        refused(result)
        assert not (tmp_path / "out").exists()
    else:
        assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose metadata is small, so that damage meets its numbers and not only its vocabulary."""
    folder = tmp_path_factory.mktemp("small")
    model = make_checkpoint(folder / "model", vocab_size=320)
    few: dict[str, Any] = {"tokens": PIECES[:320], "scores": scores()[:320], "token_type": kinds()[:320]}
    return write(
        model, folder / "model.gguf", "Q8_0", **{f"tokenizer__ggml__{key}": value for key, value in few.items()}
    )
