"""A site in the browser: a script that it runs with the page's own API, the logits of its engine, and LiteRT's own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browsing.browser import NO_GPU, SWIFTSHADER, wait_on
from support.browsing.site import Site, served
from support.checkpoints import ROOT

import gemma_edge
from gemma_edge.bundle.manifest import Manifest
from gemma_edge.text.chat import ChatTemplate
from gemma_edge.text.tokenizer import Tokenizer

MADE = ROOT / "out/web"
needs_site = pytest.mark.skipif(not (MADE / "manifest.json").is_file(), reason="no site: make web makes one, with npm")

# ASK: a page that runs a piece of JavaScript with `load`, and shows what it returns, or the error.
ASK = """<!doctype html><body><script type="module">
import {{ load }} from "./gemma-edge.js";
const options = {{ maxTokens: 40 }};
const all = async (pieces) => {{ let text = ""; for await (const piece of pieces) text += piece; return text; }};
let shown;
try {{ shown = await (async () => {{ {script} }})(); }} catch (error) {{ shown = {{ error: error.message }}; }}
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(shown);
document.body.append(result);
</script></body>"""


def ask(site: Site, home: Path, script: str, flags: Sequence[str] = NO_GPU) -> Any:
    """What a script returns in the browser."""
    (site.folder / "ask.html").write_text(ASK.format(script=script), encoding="utf-8")
    document, console = wait_on(f"{site.url}ask.html", home, 'document.getElementById("result") !== null', flags=flags)
    found = re.search(r'<pre id="result">(.*?)</pre>', document, re.DOTALL)
    assert found, console
    answer = json.loads(unescape(found[1]))
    return {**answer, "console": console} if "error" in answer else answer


# PROBE: a worker that feeds texts chunk by chunk and posts the logits after each chunk.
PROBE = """
importScripts("sha256.js");
(async () => {{
  const {{ open }} = await import("./engine.js");
  const engine = await open({{ url: new URL("./", location.href).href, accelerator: "{accelerator}" }}, () => {{}});
  const ids = {ids}, rows = [];
  for (const end of {ends}) rows.push([...(await engine.feed(ids.slice(0, end), {pinned})).logits]);
  const {{ getGlobalLiteRt, getWebGpuDevice }} = await import("./litert.js");
  const heap = getGlobalLiteRt().liteRtWasm.HEAPU8.length;
  getWebGpuDevice()?.destroy();
  const lost = "{accelerator}" === "webgpu" && (await engine.feed(ids).catch((error) => error.message));
  const zeros = {{ logits: {{ data: async () => new Float32Array(9).fill(5e-44), delete() {{}} }} }};
  for (const each of engine.signatures) each.runner = {{ run: async () => zeros }};
  engine.gpu.error = null;
  const empty = await engine.feed(ids).catch((error) => error.message);
  postMessage({{ rows, heap, lost, empty }});
}})().catch((error) => postMessage({{ error: error.message }}));
"""


def feed(
    bundle: Path, ids: list[int], chunks: Sequence[int], home: Path, accelerator: str = "wasm", pinned: int = 0
) -> dict[str, Any]:
    """What the engine says to tokens fed in chunks, of which the first `pinned` ones stay visible.

    Returns:
        rows: logits after each chunk; heap: bytes of WebAssembly's memory; lost: the error after the GPU went away;
        empty: the error after LiteRT.js returned nothing but zeros.
    """
    shutil.copyfile(MADE / "tokenizer.json", bundle / "tokenizer.json")
    ends = np.cumsum(chunks).tolist()
    probe = PROBE.format(ids=ids, ends=ends, accelerator=accelerator, pinned=pinned)
    return work(bundle, probe, home, SWIFTSHADER if accelerator == "webgpu" else NO_GPU)


def work(bundle: Path, script: str, home: Path, flags: Sequence[str] = NO_GPU) -> dict[str, Any]:
    """What a worker beside a bundle's files posts."""
    (bundle / "probe.js").write_text(script, encoding="utf-8")
    wait = "return new Promise((resolve) => { new Worker('probe.js').onmessage = ({ data }) => resolve(data); });"
    with served(bundle) as site:
        said: dict[str, Any] = ask(site, home, wait, flags)
    assert "error" not in said, said
    return said


def without_npm(patch: pytest.MonkeyPatch) -> None:
    """Let sites be made of the page and the libraries of MADE."""
    patch.setattr("gemma_edge.export.web.backend.check_npm", lambda: None)
    patch.setattr("gemma_edge.export.web.backend.write_site", _copy_site)


def _copy_site(out: Path) -> None:
    for file in MADE.iterdir():
        if file.suffix in (".js", ".wasm", ".html", ".ts"):
            shutil.copyfile(file, out / file.name)


NEARLY = 0.2  # wasm rounds activations at other places than the native kernels: logits of the demo differ by up to 0.1


def assert_native_agrees(prompt: str, tokens: list[int]) -> None:
    """LiteRT itself would have chosen each of these tokens after the ones before it, or nearly."""
    runtime = gemma_edge.load(MADE)
    logits, others = runtime.prefill(Tokenizer(MADE, runtime.manifest).encode(prompt)), 0
    for token in tokens:
        assert logits[token] >= logits.max() - NEARLY, (token, int(logits.argmax()))
        others += token != logits.argmax()
        logits = runtime.decode(token)
    assert others <= len(tokens) / 8


def decoded(tokens: list[int]) -> str:
    return Tokenizer(MADE, Manifest.load(MADE)).decode(tokens)


def rendered(*said: str) -> str:
    """A conversation as gemma-run's template writes it, up to the next answer."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)]
    return ChatTemplate.from_bundle(MADE).render(messages)
