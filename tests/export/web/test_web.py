"""The site that `--target web` makes, in a real browser: Chromium without a window runs the model by LiteRT.js."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browsing.browser import SWIFTSHADER, needs_browser, wait_on
from support.browsing.page import (
    MADE,
    ask,
    assert_native_agrees,
    decoded,
    feed,
    needs_site,
    rendered,
    without_npm,
    work,
)
from support.browsing.site import served
from support.checkpoints import kl_divergence, relative_error
from support.lowered import prefilled, some_ids
from support.tflite_bundles import UNEVEN, make_bundle

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'gemma-edge[tflite]'")

import gemma_edge
from gemma_edge.quantize.recipe import make_recipe
from gemma_edge.runtimes.generation.turn import OTHER_WORDS, beginning
from gemma_edge.text.tokenizer import Tokenizer

PROMPT = (
    "And the LORD said unto Moses, Speak unto the children of Israel, and say unto them, When ye be come into the land"
)
NEW = 40

pytestmark = [needs_browser, needs_site]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the site."""
    return Path(shutil.copytree(MADE, tmp_path / "site"))


COMPLETE = "const model = await load('./'), session = model.session(); "
COMPLETE += f"const text = await all(session.complete({json.dumps(PROMPT)}, options)); "
COMPLETE += "return {text, stats: session.stats, threads: model.threads, name: model.name, context: model.context};"


def test_it_answers_as_gemma_run_does_and_fetches_the_weights_once(folder: Path, tmp_path: Path) -> None:
    with served(folder) as site:
        first, second = (ask(site, tmp_path, COMPLETE) for _ in range(2))
    tokens = first["stats"]["tokens"]
    assert len(tokens) == NEW and tokens == second["stats"]["tokens"]
    assert first["text"] == second["text"] == decoded(tokens)
    assert_native_agrees(PROMPT, tokens)
    assert [path for path, _ in site.requests].count("/model.web.tflite") == 1


def test_the_page_talks_and_does_so_without_a_network_from_the_second_visit_on(folder: Path, tmp_path: Path) -> None:
    """The service worker isolates the page, so it has threads, from the first visit on."""
    ready = 'document.getElementById("state")?.textContent.startsWith("Ready") === true'
    with served(folder) as site:
        document, _ = wait_on(site.url, tmp_path, ready)
        assert f"Ready: {min(4, os.cpu_count() or 1)} thread" in document
        (folder / "talk.html").write_text(
            (folder / "index.html").read_text(encoding="utf-8").replace("</body>", f"<script>{TALK}</script></body>"),
            encoding="utf-8",
        )
        said = ask(site, tmp_path, CHAT.format(messages=json.dumps([PROMPT])))
        wait_on(f"{site.url}talk.html", tmp_path, 'document.title === "talked"')
    document, _ = wait_on(f"{site.url}talk.html", tmp_path, 'document.title === "talked"')
    (turn,) = re.findall(r'<p class="model">(.*?)</p>', document, re.DOTALL)
    ((tokens, text, _),) = said["turns"]
    assert unescape(turn) == text == decoded(tokens)
    assert_native_agrees(rendered(PROMPT), tokens)


# TALK: writes PROMPT into the page's form as soon as it is there, and says when the answer is complete.
TALK = f"""
const wait = setInterval(() => {{
  const form = document.getElementById("form");
  if (form.hidden || document.querySelector("#turns p")) return;
  document.getElementById("text").value = {json.dumps(PROMPT)};
  form.requestSubmit();
  const done = setInterval(() => {{
    if (!document.getElementById("send").hidden) {{ clearInterval(done); document.title = "talked"; }}
  }}, 50);
}}, 50);
"""


CHAT = """
const session = (await load('./')).session(), turns = [];
for (const message of {messages}) {{
  const text = await all(session.chat(message)), {{ tokens, promptTokens }} = session.stats;
  turns.push([tokens, text, promptTokens]);
}}
return {{ turns }};
"""


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_there(folder: Path, tmp_path: Path, ranges: bool) -> None:
    """A server that knows no ranges sends the whole file again."""
    with served(folder) as site:
        site.ranges, site.break_off["model.web.tflite"] = ranges, 3_000_000
        broken = ask(site, tmp_path, COMPLETE)
        assert "model.web.tflite broke off" in broken["error"] and "load the page again" in broken["error"]
        assert_native_agrees(PROMPT, ask(site, tmp_path, COMPLETE)["stats"]["tokens"])
        asked = [part for path, part in site.requests if path == "/model.web.tflite"]
    assert asked[0] is None and int(re.sub(r"\D", "", str(asked[1]))) > 0


def test_another_file_than_the_manifests_is_refused_and_forgotten(folder: Path, tmp_path: Path) -> None:
    good = (folder / "model.web.tflite").read_bytes()
    with served(folder) as site:
        (folder / "model.web.tflite").write_bytes(good[:-100] + bytes(100))
        assert "is not the file that the manifest names" in ask(site, tmp_path, COMPLETE)["error"]
        (folder / "model.web.tflite").write_bytes(good + bytes(1))
        assert "has more than" in ask(site, tmp_path, COMPLETE)["error"]
        (folder / "model.web.tflite").write_bytes(good)
        assert_native_agrees(PROMPT, ask(site, tmp_path, COMPLETE)["stats"]["tokens"])


@pytest.mark.parametrize(
    ("file", "said"),
    [("manifest.json", "manifest.json: the server answered 404"), ("tokenizer.json", "has no tokenizer.json")],
)
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, file: str, said: str) -> None:
    (folder / file).unlink()
    with served(folder) as site:
        assert said in ask(site, tmp_path, COMPLETE)["error"]


def test_a_conversation_is_gemma_runs(folder: Path, tmp_path: Path) -> None:
    """The second message goes on in the caches of the first one."""
    with served(folder) as site:
        said = ask(site, tmp_path, CHAT.format(messages=json.dumps(["Who art thou?", "Go on."])))
    (first, answer, fed), (second, _, more) = said["turns"]
    assert more <= fed + 5
    assert_native_agrees(rendered("Who art thou?"), first)
    assert_native_agrees(rendered("Who art thou?", answer, "Go on."), second)


# KEPT: prompts as the engine would feed them, and a text that goes on after another one was pinned.
KEPT = """
importScripts("sha256.js");
(async () => {{
  const {{ open }} = await import("./engine.js");
  const engine = await open({{ url: new URL("./", location.href).href }}, () => {{}});
  const prompts = {prompts}.map((prompt) => engine.ids(prompt)), ids = {ids}, logits = {{}};
  for (const pinned of [9, 0, 4]) logits[pinned] = [...(await engine.feed(ids, pinned)).logits];
  postMessage({{ prompts, logits, keeps: engine.keeps }});
}})().catch((error) => postMessage({{ error: error.message }}));
"""
SYSTEM = "Thou art a shepherd. "


def test_what_stands_before_the_users_own_words_stays_visible(folder: Path, tmp_path: Path) -> None:
    runtime = gemma_edge.load(MADE)
    encode = Tokenizer(MADE, runtime.manifest).encode
    said = [["Who art thou?"], ["Who art thou?", "A man.", "Go on."]]
    right: list[dict[str, Any]] = []
    for texts in said:
        prompt = rendered(SYSTEM + texts[0], *texts[1:])
        ids = encode(prompt)
        right.append({"ids": ids, "pinned": beginning(ids, prompt, rendered(SYSTEM + OTHER_WORDS), encode)})
    assert right[0]["pinned"] > 8
    roles = ("user", "model")
    messages = [[{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)] for texts in said]
    prompts = [{"messages": each, "system": system} for each in messages for system in (SYSTEM, SYSTEM * 200)]
    ids = some_ids(runtime.cache.context + 300, runtime.vocab_size)
    found = work(folder, KEPT.format(prompts=json.dumps(prompts), ids=ids), tmp_path)
    assert found["prompts"][::2] == right
    assert [each["pinned"] for each in found["prompts"][1::2]] == [0, 0], "it is longer than what is kept"
    assert found["keeps"] == runtime.cache.pinned
    for pinned, logits in found["logits"].items():
        runtime.reset()
        runtime.pin(int(pinned))
        assert relative_error(torch.tensor(logits), torch.from_numpy(runtime.prefill(ids))) <= 0.02, pinned


@pytest.mark.parametrize("accelerator", ["wasm", "webgpu"])
@pytest.mark.parametrize(("shape", "pinned"), [("starts_global", 9), ("gemma3_odd", 0)])
def test_logits_of_a_random_model_past_window_and_context_in_uneven_chunks(
    shape: str,
    pinned: int,
    accelerator: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every weight is random and different. The browser's logits are compared with LiteRT's for the same file."""
    without_npm(monkeypatch)
    recipe = make_recipe(4, group_size=0, method="rtn")
    quantized, bundle = make_bundle(checkpoint(shape), tmp_path, recipe, context=24, name="web", pinned=pinned)
    ids = some_ids(sum(UNEVEN), quantized.config.vocab_size)
    runtime = gemma_edge.load(bundle)
    plain = prefilled(runtime, ids, UNEVEN)
    runtime.reset()
    runtime.pin(pinned)
    expected = prefilled(runtime, ids, UNEVEN)
    assert not pinned or relative_error(plain, expected) > 0.05, "the bounds would let no pin pass"
    said = feed(bundle, ids, UNEVEN, tmp_path, accelerator, pinned)
    assert accelerator == "wasm" or said["lost"].startswith("the GPU was lost (")
    assert "all its logits are 0" in said["empty"]
    found = torch.tensor(said["rows"])
    assert relative_error(found, expected) <= 0.02
    assert kl_divergence(found, expected) <= 2e-3
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


STOPPED = """
const model = await load('./'), session = model.session(), pieces = [];
const say = (choices) => all(session.complete('And', choices));
for await (const piece of session.complete('And', {maxTokens: 400})) {
  pieces.push(piece);
  if (pieces.length === 3) session.stop();
}
const first = session.stats;
for await (const piece of session.complete('And', {maxTokens: 400})) break;
await say({maxTokens: 2});
const after = session.stats, seeded = [];
for (const seed of [7, 7, 8]) seeded.push(await say({maxTokens: 12, temperature: 1, topK: 20, topP: 0.9, seed}));
const refused = await say({topP: 2}).catch((error) => error.message);
const talk = model.session();
for await (const piece of talk.chat('And')) {
  talk.reset();
  break;
}
return {first, after, seeded, refused, messages: talk.messages};
"""


def test_stop_within_a_token_seeds_and_a_wrong_option(folder: Path, tmp_path: Path) -> None:
    with served(folder) as site:
        said = ask(site, tmp_path, STOPPED)
    assert "error" not in said, said
    assert said["first"]["stopped"] and 3 <= len(said["first"]["tokens"]) < 20
    assert not said["after"]["stopped"] and len(said["after"]["tokens"]) == 2
    same, again, other = said["seeded"]
    assert same == again != other
    assert "topP 2" in said["refused"]
    assert said["messages"] == []  # the end of an answer was put into the conversation after a reset


GPU = "const model = await load('./', {accelerator: 'webgpu'}), session = model.session(); "
GPU += f"await all(session.complete({json.dumps(PROMPT)}, {{maxTokens: 4}})); return session.stats;"


def test_four_tokens_by_webgpu(folder: Path, tmp_path: Path) -> None:
    """On SwiftShader, a GPU driver that computes on the CPU."""
    with served(folder) as site:
        tokens = ask(site, tmp_path, GPU, SWIFTSHADER)["tokens"]
        refused = ask(site, tmp_path, GPU)["error"]
        unknown = ask(site, tmp_path, GPU.replace("webgpu", "tpu"))["error"]
    assert len(tokens) == 4
    assert_native_agrees(PROMPT, tokens)
    assert "gives the page no GPU" in refused
    assert "accelerator tpu: give one of wasm, webgpu" in unknown
