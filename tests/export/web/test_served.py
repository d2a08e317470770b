"""`gemma-run serve` with a site's bundle: a tab of the server's page runs the model in the browser."""

from __future__ import annotations

import json
import os
import re
from html import unescape
from pathlib import Path

import pytest
from support.browsing.browser import needs_browser, wait_on
from support.browsing.page import MADE, assert_native_agrees, decoded, needs_site, rendered

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed: pip install 'gemma-edge[tflite]'")
pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")

from support.serving import in_a_thread

import gemma_edge
from gemma_edge.runtimes.generation.generate import GenerationOptions
from gemma_edge.runtimes.serve.access import Access
from gemma_edge.runtimes.serve.engine import Engine

pytestmark = [needs_browser, needs_site]

KEY = "a secret"
MESSAGE = "Who art thou?"
# TALK: gives the page the key, asks one question in each tab, and shows what LiteRT.js computed. The expression is evaluated
# again and again until it is true.
TALK = f"""(() => {{
  if (location.pathname === "/health") {{
    sessionStorage.setItem("key", {json.dumps(KEY)});
    location.href = "/";
  }}
  if (document.getElementById("stats")) return true;
  if (window.asked || document.getElementById("places")?.hidden !== false) return false;
  window.asked = true;
  const say = (text) => {{ at("text").value = text; at("form").requestSubmit(); }};
  const until = async (ready) => {{ while (!ready()) await new Promise((next) => setTimeout(next, 50)); }};
  (async () => {{
    say({json.dumps(MESSAGE)});
    await until(() => !running);
    const {{textContent: served}} = document.querySelector(".assistant");
    at("browser").click();
    say({json.dumps(MESSAGE)});
    await until(() => !running);
    const {{session, model}} = await browser.model;
    const isolated = crossOriginIsolated, {{threads}} = model;
    const stats = document.createElement("pre");
    stats.id = "stats";
    stats.textContent = JSON.stringify({{...session.stats, served, isolated, threads}});
    document.body.append(stats);
  }})();
  return false;
}})()"""


@pytest.mark.parametrize("key", [None, KEY])
def test_the_tab_answers_as_gemma_run_does(key: str | None, tmp_path: Path) -> None:
    engine = Engine(gemma_edge.load(MADE, threads=1), GenerationOptions(max_tokens=24))
    with in_a_thread(engine, Access(key=key)) as port:
        document, console = wait_on(f"http://127.0.0.1:{port}/health", tmp_path, TALK)
    assert not [line for line in console if "Content Security Policy" in line or "Uncaught" in line]
    found = re.search(r'<pre id="stats">(.*?)</pre>', document, re.DOTALL)
    assert found
    said = json.loads(unescape(found[1]))
    turns = [
        unescape(turn) for turn in re.findall(r'<div class="turn (?:user|assistant)">(.*?)</div>', document, re.DOTALL)
    ]
    assert turns == [MESSAGE, decoded(said["tokens"])]  # those of the other tab are hidden
    assert_native_agrees(rendered(MESSAGE), said["tokens"])
    assert said["isolated"] and said["threads"] == min(4, os.cpu_count() or 1)
    assert said["served"]
    assert engine.counts["requests"] == 1  # the browser's answer is its own
