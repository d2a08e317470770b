"""The campaign against inputs: the files of a small checkpoint folder are damaged, then it is planned and exported. The same
model lies beside them as GGUF files, one and a split one, which are damaged and exported too.

Each try damages one file, sometimes two. It must end in a bundle or in one line, in time, with nothing left beside OUT.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support.checkpoints import DEMO
from support.gguf_files import load_weights, mutated, write
from transformers import Gemma2Config, Gemma2ForCausalLM

from campaigns.campaign import Campaign, Hang, main, outcome_of, time_limit
from gemma_edge.export.cli import main as gemma_export
from gemma_edge.quantize.calibration.cache import VARIABLE

SECONDS = 30.0
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
    "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
# Values that replace the value of a key.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2.5, 1e21, 1e-320, float("inf"), float("nan"), 10**18, 10**400, "", "x", "<eos>", "1",
    "\0", "\ud800", "../../etc/passwd", "a" * 5000, [], [[]], [1], ["x"], [None], {}, {"a": 1}, {"content": 5}, "{% for %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 12 }}", "\x1b[31m`bits`\n",
)  # fmt: skip
WHOLE, PARTS = "model.gguf", ("part-00001-of-00002.gguf", "part-00002-of-00002.gguf")
Damage = Callable[[random.Random, Path], str]


def make_model(folder: Path) -> Path:
    """A model of two layers in two shards, with every file that an export reads, an adapter and a recipe."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE)).bfloat16()
    model.save_pretrained(folder, max_shard_size="400KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    text = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(text["chat_template"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<bos>"}))
    lora = folder / "lora"
    lora.mkdir()
    adapter: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    adapter["modules_to_save"] = ["model.norm"]
    (lora / "adapter_config.json").write_text(json.dumps({**adapter, "alpha_pattern": {"q_proj": 8}}))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    sides = {f"{prefix}.lora_A.weight": torch.ones(2, 64), f"{prefix}.lora_B.weight": torch.ones(64, 2)}
    sides["base_model.model.model.norm.weight"] = torch.ones(64)
    save_file(sides, lora / "adapter_model.safetensors")
    integers = {"bits": 8, "group_size": 0, "symmetric": True}
    rules = [{"pattern": ".*", "config": integers, "method": "rtn"}]
    (folder / "recipe.json").write_text(json.dumps({"name": "mine", "rules": rules, "float_bits": 32}))
    write(folder, folder / WHOLE, "Q8_0")
    half = len(load_weights(folder)) // 2
    for number, part in enumerate((slice(half), slice(half, None))):
        write(folder, folder / PARTS[number], "Q4_0", part=part, split__no=number, split__count=2)
    return folder


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of a JSON document; of a long list or object only those to the first ones."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, below in list(inner)[:60] for place in _places(below, (*at, key)))]


def _change(rng: random.Random, data: Any) -> tuple[Any, str]:
    """Another value at one place, or the key missing, or a second key."""
    place = rng.choice(_places(data))
    value = rng.choice(VALUES)
    if not place:
        return value, "whole"
    owner = data
    for key in place[:-1]:
        owner = owner[key]
    if rng.random() < 0.2:
        del owner[place[-1]]
        return data, f"{place} missing"
    owner[place[-1]] = value
    return data, f"{place} is {str(value)[:40]!a}"


def change_json(rng: random.Random, path: Path) -> str:
    data, what = _change(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(data))
    return what


def change_header(rng: random.Random, path: Path) -> str:
    """The header of a safetensors file, its length right or wrong."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, what = _change(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode()
    length = rng.choice((len(text), len(text), len(text), 0, 1 << 63, len(text) + 9))
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])
    return f"header {what}, length {length}"


def change_gguf(rng: random.Random, path: Path) -> str:
    path.write_bytes(mutated(path.read_bytes(), rng))
    return "header or tensors changed"


def truncate(rng: random.Random, path: Path) -> str:
    os.truncate(path, size := rng.randrange(path.stat().st_size))
    return f"cut to {size}"


def double(rng: random.Random, path: Path) -> str:
    path.write_bytes(path.read_bytes() * 2)
    return "doubled"


def flip(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 20)))]
    for place in places:
        data[place] = rng.choice((0, 0x22, 0x5B, 0x7B, 0xFF, rng.randrange(256)))
    path.write_bytes(data)
    return f"bytes changed at {places[:3]}"


def replace_with(data: bytes, words: str) -> Damage:
    def put(rng: random.Random, path: Path) -> str:
        path.write_bytes(data)
        return words

    return put


def byte_order_mark(rng: random.Random, path: Path) -> str:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return "byte order mark"


def other_encoding(rng: random.Random, path: Path) -> str:
    path.write_text(path.read_bytes().decode("latin-1"), encoding="utf-16")
    return "UTF-16"


def instead(put: Callable[[Path], object], words: str) -> Damage:
    """Something else in the file's place."""

    def damage(rng: random.Random, path: Path) -> str:
        path.unlink()
        put(path)
        return words

    return damage


def terabytes(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)


ANY_FILE: tuple[Damage, ...] = (
    truncate,
    double,
    flip,
    flip,
    byte_order_mark,
    other_encoding,
    replace_with(b"", "empty"),
    replace_with(b"\0" * 100, "NUL"),
    replace_with(b"[" * 100_000, "deep"),
    replace_with(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "deep and closed"),
    replace_with(b"[" * 900 + b"]" * 900, "900 deep"),
    instead(lambda path: None, "missing"),
    instead(Path.mkdir, "a folder"),
    instead(os.mkfifo, "a pipe"),
    instead(lambda path: path.symlink_to(path.name), "a circle of links"),
    instead(lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
    instead(lambda path: path.symlink_to("/dev/zero"), "a device"),
    instead(terabytes, "terabytes"),
)


def damage_one(rng: random.Random, folder: Path) -> str:
    """Damage one file. Returns in words what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()))
    own = {".json": change_json, ".safetensors": change_header, ".gguf": change_gguf}.get(path.suffix)
    try:
        done = (own if own and rng.random() < 0.6 else rng.choice(ANY_FILE))(rng, path)
    except (ValueError, struct.error, RecursionError, MemoryError):  # damaged before
        done = truncate(rng, path) if path.stat().st_size else "nothing"
    return f"{path.relative_to(folder)}: {done}"


def _given(what: str) -> str:
    """What is exported after a damage: a GGUF file if one was damaged, else the folder."""
    return next((name for name in (WHOLE, *PARTS) if name in what), ".")


def one_try(rng: random.Random, model: Path, place: Path, damages: int | None = None) -> tuple[str, str]:
    """Damage a copy of the model, plan or export it; the outcome and what was done.

    Args:
        rng: the source of chance.
        model: the whole folder.
        place: an empty folder.
        damages: how many; None leaves it to chance.
    """
    folder, out = place / "model", place / "out"
    shutil.copytree(model, folder)
    what = "; ".join(damage_one(rng, folder) for _ in range(rng.choice((1, 1, 1, 2)) if damages is None else damages))
    given = folder / _given(what)
    words = [str(given)] if rng.random() < 0.7 else ["plan", str(given)]
    if words[0] != "plan":
        words += ["-o", str(out), "--verify", "none"]
    words += ["--backend", "onnx"]
    words += ["--recipe", str(folder / "recipe.json")] if "recipe" in what else ["--bits", "8"]
    words += ["--lora", str(folder / "lora")] if "lora" in what else []
    try:
        with time_limit(SECONDS):
            result = CliRunner().invoke(gemma_export, words)
    except Hang:
        return "hang", f"{what}; {' '.join(words)}"
    failed = result.exception is not None and not isinstance(result.exception, SystemExit)
    stderr = f"{result.stderr}\nTraceback: {result.exception!r}" if failed else result.stderr
    outcome = outcome_of(result.exit_code, stderr)
    made = ["out"] if outcome == "correct" and words[0] != "plan" else []
    if outcome in ("correct", "refused") and sorted(path.name for path in place.iterdir()) != sorted(["model", *made]):
        outcome, stderr = "left_over", str(sorted(path.name for path in place.iterdir()))
    return outcome, f"{what}: {stderr.strip()[-400:]}"


def run(campaign: Campaign, tries: int) -> None:
    """Damage and export that many times."""
    torch.set_num_threads(1)  # in a model so small, threads wait for each other longer than they compute
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault(VARIABLE, str(Path(name, "cache")))
        model = make_model(Path(name, "whole"))
        place = Path(name, "undamaged")
        place.mkdir()
        outcome, what = one_try(campaign.random, model, place, damages=0)
        assert outcome == "correct", f"the undamaged model: {outcome}: {what}"
        for number in range(tries):
            place = Path(name, str(number))
            place.mkdir()
            campaign.tried(*one_try(campaign.random, model, place))
            shutil.rmtree(place)


if __name__ == "__main__":
    main("inputs", run)
