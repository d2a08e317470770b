// The page of a site: shows how loading goes on, and one conversation.
import { load } from "./gemma-edge.js";

const at = (id) => document.getElementById(id);
const say = (text) => (at("state").textContent = text);
const STAGES = { download: "Downloading", check: "Checking", compile: "Starting" };

/** Offline from the second visit on, and isolated from other origins, which threads need. */
async function install() {
  const registered = await navigator.serviceWorker?.register("sw.js").catch(() => null);
  if (!registered || crossOriginIsolated || sessionStorage.reloaded) return; // where a reload does not help, one thread computes
  await navigator.serviceWorker.ready;
  sessionStorage.reloaded = "yes";
  location.reload();
  await new Promise(() => {});
}

function progress({ stage, done, total }) {
  at("progress").value = done / total;
  say(`${STAGES[stage]}: ${Math.round(done / 1e6)} of ${Math.round(total / 1e6)} MB`);
}

function turn(kind, text) {
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  at("turns").append(element);
  return element;
}

async function answer(session, model, text) {
  turn("user", text);
  const element = turn("model", "");
  busy(true);
  try {
    for await (const piece of model.chats ? session.chat(text) : session.complete(text)) {
      element.textContent += piece;
      element.scrollIntoView({ block: "end" });
    }
    const { tokens, decodeMs, stopped } = session.stats;
    say(`${tokens.length} tokens, ${((1e3 * tokens.length) / decodeMs).toFixed(1)} a second${stopped ? ", stopped" : ""}`);
  } catch (error) {
    say(error.message);
  }
  busy(false);
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
}

async function start() {
  await install();
  const accelerator = new URLSearchParams(location.search).get("accelerator") ?? "wasm";
  const model = await load("./", { accelerator, onProgress: progress });
  const session = model.session();
  at("name").textContent = model.name;
  at("progress").hidden = true;
  at("form").hidden = false;
  const used = model.accelerator === "webgpu" ? "the GPU" : `${model.threads} thread${model.threads > 1 ? "s" : ""}`;
  say(`Ready: ${used}. Nothing you write leaves this page.`);
  at("stop").onclick = () => session.stop();
  at("text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("form").requestSubmit();
    }
  };
  at("form").onsubmit = (event) => {
    event.preventDefault();
    const text = at("text").value.trim();
    if (!text || at("send").hidden) return;
    at("text").value = "";
    answer(session, model, text);
  };
}

start().catch((error) => say(error.message));
