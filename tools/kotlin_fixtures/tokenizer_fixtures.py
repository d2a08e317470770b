"""Write the token ids of Hugging Face tokenizers for many texts; the Kotlin tokenizer must give the same ids.

There are four tokenizers: the demo's, what `--vocab` leaves of it, one of 256,000 tokens with random merges, and the one without
merges of tools/benchmarks/synthetic_tokenizer.py. Gemma's own is the fifth if its folder is given. The texts mix many scripts,
code, emoji, control tokens and bytes; most of them are random strings of these parts.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from synthetic_tokenizer import write_tokenizer

from gemma_edge.quantize.vocabulary.kept import kept_ids, rewritten

VOCAB = 256_000
FUZZED = 10_000
WORDS = """The quick brown fox. In the beginning God created the heaven and the earth. über Ångström naïve façade Straße
Ελληνικά γλώσσα Русский язык Українська мова עברית العربية فارسی हिन्दी বাংলা தமிழ்
తెలుగు ไทย ລາວ 中文 漢字 日本語 ひらがな カタカナ 한국어 ქართული
հայերեն አማርኛ ᠮᠣᠩᠭᠣᠯ བོད་སྐད ភាសាខ្មែរ မြန်မာ ᏣᎳᎩ 𐍈𐌰𐌹 𝒜𝓃𝒾 🙂 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ✨ é é ﬁ ＡＢＣ ① ½ ∑
∀x∈ℝ →⇒ “quotes” ‘’ — … € ₿ ﷽ \u200b \u200f \ufeff \u00a0 \u3000
for(int i=0;i<n;++i){a[i]+=b[i];} def f(x): return {"k": [1, 2.5e-3, None]} <html>
</td> https://example.com/?q=a%20b&c=d#e C:\\dir\\file
1234567890 3.14159 -42 1,000,000 0x1F \t \n \r\n \n\n \n\n\n  """.split(" ")
CONTROL = ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<0x0A>", "<unused1>", "▁", "▁▁▁"]
BLANKS = [" ", "  ", "     ", "\n", "\n\n\n", "\t", "\t\t", "\r\n"]


def lines() -> list[str]:
    """A thousand texts: every part alone, between others and repeated, then long mixtures."""
    parts = [*WORDS, *CONTROL, *BLANKS]
    texts = [
        "",
        *parts,
        *(f"a{part}b" for part in parts),
        *(f" {part} " for part in parts),
        *(part * 3 for part in parts),
    ]
    rng = random.Random(1)
    while len(texts) < 995:
        texts.append("".join(rng.choice(parts) + rng.choice(["", " ", " ", "\n"]) for _ in range(rng.randint(2, 60))))
    return [
        *texts,
        *("".join(rng.choice(parts) for _ in range(3000)), "a" * 5000, "\U0001f642" * 500, " " * 300, "\n" * 300),
    ]


def fuzzed() -> list[str]:
    """Short random strings of parts and of any characters except surrogates."""
    rng = random.Random(2)
    parts = [*WORDS, *CONTROL, *BLANKS, *"abcdefghijklmnopqrstuvwxyz"]

    def anything() -> str:
        code = rng.randrange(0x11_0000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    return [
        "".join(anything() if rng.random() < 0.1 else rng.choice(parts) for _ in range(rng.randint(1, 12)))
        for _ in range(FUZZED)
    ]


def write_random_bpe(folder: Path) -> None:
    """Write the synthetic tokenizer with random merges of its tokens in place of its filler tokens."""
    write_tokenizer(folder, VOCAB)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    old = list(data["model"]["vocab"])
    tokens = [token for token in old if not token.startswith("\ue000")]
    start = tokens.index("▁")
    known = set(tokens)
    rng = random.Random(3)
    merges = []
    letters = [token for token in tokens[start:] if token in "▁abcdefghijklmnopqrstuvwxyz.,"]
    pool = letters * 50 + tokens[start:]
    while len(tokens) < VOCAB:
        left, right = rng.choice(pool), rng.choice(pool)
        if len(left + right) > 12:
            continue
        merges.append([left, right])
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            pool.append(left + right)
    unique = list({tuple(pair): pair for pair in merges}.values())
    data["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": unique}
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_trimmed(folder: Path, demo: Path) -> None:
    """Write the demo's tokenizer with the tokens of a few sentences alone."""
    data = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    ids = kept_ids(data, [" ".join(WORDS[:16])], len(data["model"]["vocab"]), (), by_characters=False)
    (folder / "tokenizer.json").write_text(json.dumps(rewritten(data, ids), ensure_ascii=False), encoding="utf-8")


def write_answers(folder: Path) -> None:
    """Write `texts.json` beside a tokenizer.json: each text, its ids without BOS, and the text of these ids."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    rows: list[dict[str, Any]] = []
    for text in [*lines(), *fuzzed()]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    # ids that no text encodes to: bytes that are not valid UTF-8, with special tokens between them
    rng = random.Random(4)
    size = tokenizer.get_vocab_size()
    first_byte = tokenizer.token_to_id("<0x00>") or 0
    for _ in range(500):
        ids = [first_byte + rng.randrange(256) if rng.random() < 0.5 else rng.randrange(size) for _ in range(8)]
        rows.append({"text": None, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    (folder / "texts.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_tokenizers(out: Path, demo: Path, gemma: Path | None) -> None:
    """Write tokenizers and texts into `out`, one folder for each tokenizer.

    Args:
        out: the folder, which is removed first if it exists.
        demo: the demo's checkpoint.
        gemma: a folder with Gemma's own tokenizer.json, or None.
    """
    shutil.rmtree(out, ignore_errors=True)
    for name in ("demo", "trimmed", "random", "plain"):
        (out / name).mkdir(parents=True)
    shutil.copy(demo / "tokenizer.json", out / "demo")
    write_trimmed(out / "trimmed", demo)
    write_random_bpe(out / "random")
    write_tokenizer(out / "plain", VOCAB)
    if gemma:
        (out / "gemma").mkdir()
        shutil.copy(gemma / "tokenizer.json", out / "gemma")
    for folder in out.iterdir():
        write_answers(folder)
