"""The server's chat page: one file, nothing fetched from elsewhere, text only ever set as text."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>gemma-edge</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; }
header { display: flex; justify-content: space-between; align-items: baseline; }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem .8rem; margin: .5rem 0; border-radius: .6rem; }
.user { background: color-mix(in srgb, CanvasText 10%, Canvas); margin-left: 3rem; }
.error { color: #c00; }
form { display: flex; gap: .5rem; position: sticky; bottom: 0; padding: .5rem 0; background: Canvas; }
textarea { flex: 1; font: inherit; padding: .5rem; }
button { font: inherit; padding: .3rem .9rem; }
#used { opacity: .7; font-size: .85rem; min-height: 1.3rem; }
</style></head><body>
<header><h1 id="model">gemma-edge</h1><button id="new" type="button">New chat</button></header>
<main id="turns" aria-live="polite"></main>
<div id="used"></div>
<form id="form"><textarea id="text" rows="2" aria-label="Message" placeholder="Message" autofocus></textarea>
<button id="send">Send</button></form>
<script>
"use strict";
const at = id => document.getElementById(id);
let messages = [], running = null;

function show(role, text) {
  const turn = document.createElement("div");
  turn.className = "turn " + role;
  turn.textContent = text;
  at("turns").append(turn);
  turn.scrollIntoView({block: "end"});
  return turn;
}

async function answer(turn, signal) {
  const started = performance.now();
  const body = JSON.stringify({messages, stream: true, stream_options: {include_usage: true}});
  const response = await fetch("v1/chat/completions", {method: "POST", body, signal});
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const events = (rest + part.value).split("\\n\\n");
    rest = events.pop();
    for (const event of events.map(each => each.slice(6)).filter(each => each !== "[DONE]")) {
      const data = JSON.parse(event);
      if (data.error) throw new Error(data.error.message);
      turn.textContent += data.choices[0]?.delta.content ?? "";
      if (data.usage) {
        const used = data.usage, seconds = (performance.now() - started) / 1000;
        at("used").textContent = `${used.completion_tokens} tokens in ${seconds.toFixed(1)} s, prompt of ` +
          `${used.prompt_tokens}, ${used.prompt_tokens_details.cached_tokens} of them cached`;
      }
    }
  }
}

async function send(text) {
  messages.push({role: "user", content: text});
  show("user", text);
  const turn = show("assistant", "");
  running = new AbortController();
  at("send").textContent = "Stop";
  try {
    await answer(turn, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  messages.push({role: "assistant", content: turn.textContent});
  running = null;
  at("send").textContent = "Send";
}

at("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = at("text").value.trim();
  if (text) { at("text").value = ""; send(text); }
});
at("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("form").requestSubmit(); }
});
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("turns").replaceChildren();
  at("used").textContent = "";
});
fetch("v1/models").then(each => each.json()).then(each => { at("model").textContent = each.data[0].id; });
const asked = new URLSearchParams(location.search).get("ask");
if (asked) send(asked);
</script></body></html>
"""
