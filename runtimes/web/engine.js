// A bundle in LiteRT.js: tokens into signatures, caches from call to call, text out. Runs in worker.js.
import { Template } from "./jinja.js";
import { getWebGpuDevice, loadAndCompile, loadLiteRt, supportsFeature, Tensor } from "./litert.js";
import { sampler } from "./sampling.js";
import { stored } from "./store.js";
import { Tokenizer } from "./tokenizers.js";

const FIXED_COST = 16; // of a call, in tokens: as in bundle/signature.py
const PADDING = -1; // position of a token that fills up a call
const MAX_THREADS = 4;
const HELD = "kv_cache_held_"; // begins the names of what the slots of a kind of layer hold: export/tflite/seams.py
const OTHER_WORDS = "\ufffd"; // stands for what a user says: no text begins with it
const NOTHING = 1e-20; // LiteRT.js reports no error where a call failed; what it returns is not exactly 0

// How LiteRT.js computes, by name.
const ACCELERATORS = {
  wasm: (threads) => ({ cpuOptions: { numThreads: threads } }),
  webgpu: () => {
    if (!getWebGpuDevice()) throw new Error("this browser gives the page no GPU (WebGPU); leave out the accelerator: WebAssembly runs everywhere");
    return { gpuOptions: { precision: "fp32" } }; // in float16 the angles of positions go wrong
  },
};

export async function open({ url, threads, accelerator = "wasm" }, onProgress) {
  const choose = ACCELERATORS[accelerator];
  if (!choose) throw new Error(`accelerator ${accelerator}: give one of ${Object.keys(ACCELERATORS).join(", ")}`);
  const place = (name) => new URL(name, url.endsWith("/") ? url : `${url}/`).href;
  const manifest = await (await got(place("manifest.json"))).json();
  const web = manifest.backends?.web;
  if (!web) throw new Error(`${url} holds no web backend; export the model with --target web`);
  const { program } = web.settings;
  const file = await stored(place(program), manifest.files[program], onProgress);
  const used = await startLiteRt(threads);
  const options = choose(used);
  onProgress({ stage: "compile", done: 0, total: file.size });
  const model = await loadAndCompile(file.stream().getReader(), { accelerator, ...options }).catch((error) => {
    throw new Error(`the model does not start in this browser: ${error.message ?? error}`);
  });
  if (accelerator !== "wasm" && !model.isFullyAccelerated) throw new Error(`${accelerator} cannot run all of this model`);
  onProgress({ stage: "compile", done: file.size, total: file.size });
  const [tokenizer, config] = await Promise.all(["tokenizer.json", "tokenizer_config.json"].map((name) => json(place(name))));
  if (!tokenizer) throw new Error(`${url} has no tokenizer.json`);
  const own = await fetch(place("chat_template.jinja")).catch(() => null);
  const template = own?.ok ? await own.text() : config?.chat_template;
  return new Engine(manifest, model, new Tokenizer(tokenizer, config ?? {}), template, { accelerator, threads: used });
}

async function got(address) {
  const response = await fetch(address).catch(() => null);
  if (!response) throw new Error(`${address} cannot be reached`);
  if (!response.ok) throw new Error(`${address}: the server answered ${response.status}`);
  return response;
}

async function json(address) {
  const response = await fetch(address).catch(() => null);
  return response?.ok ? response.json() : null;
}

/** Start LiteRT; returns its threads. Threads need shared memory, which only a cross-origin isolated page has. */
async function startLiteRt(requested) {
  const can = self.crossOriginIsolated && (await supportsFeature("threads")) && (await supportsFeature("relaxedSimd"));
  const threads = can ? Math.max(1, Math.min(requested ?? MAX_THREADS, navigator.hardwareConcurrency)) : 1;
  const here = new URL("./", import.meta.url);
  // its threads are workers that run this script; without the hint they would run worker.js
  self.Module = { mainScriptUrlOrBlob: new URL("litert_wasm_threaded_internal.js", here).href };
  await loadLiteRt(here.href, { threads: threads > 1 });
  return threads;
}

class Engine {
  constructor(manifest, model, tokenizer, template, used) {
    const { plan, settings, cache } = manifest.backends.web;
    this.bos = manifest.config.bos_token_id;
    this.ends = new Set(manifest.config.eos_token_id);
    this.signatures = settings.signatures.map((each) => ({ ...each, runner: model.signatures[each.name] }));
    this.tokenizer = tokenizer;
    this.template = template ? new Template(template) : null;
    this.facts = { name: manifest.model.name, chats: Boolean(template), context: plan.context, ...used };
    this.caches = null; // tensors by name
    this.keeps = plan.pinned; // tokens that a text's beginning may keep beyond the context
    this.pins = pinsByKind(cache.layers);
    this.pinned = 0; // tokens at the beginning of the text that stay visible
    this.marked = 0; // tokens whose slots say so
    this.gpu = new Gpu(used.accelerator === "webgpu" ? getWebGpuDevice() : null);
    this.fed = []; // ids that the caches hold
    this.stopping = false;
  }

  stop() {
    this.stopping = true;
  }

  /** Answer a prompt; `tell` is called with pieces of text. Returns gemma-edge.d.ts's Stats. */
  async generate(prompt, { maxTokens = 256, ...choices }, tell) {
    const choose = sampler(choices);
    this.stopping = false;
    const started = performance.now();
    const { ids, pinned } = this.ids(prompt);
    const { logits: first, fed } = await this.feed(ids, pinned);
    let logits = first;
    const answering = performance.now(), tokens = [], text = new Stream(this.tokenizer, tell);
    while (logits && tokens.length < maxTokens && !this.stopping) {
      const id = choose(logits);
      if (this.ends.has(id)) break;
      tokens.push(id);
      text.add(id);
      if (tokens.length < maxTokens) ({ logits } = await this.feed([...this.fed, id], pinned));
      await breathe();
    }
    text.end();
    const ended = performance.now();
    return { promptTokens: fed, tokens, prefillMs: answering - started, decodeMs: ended - answering, stopped: this.stopping };
  }

  /** A prompt's ids, and how many of them come before the user's own words and can be kept: runtimes/generation/turn.py. */
  ids({ text, messages, system = "" }) {
    if (!messages) return { ids: this.encode(text), pinned: 0 };
    const [first, ...others] = messages;
    const whole = this.render([{ ...first, content: system + first.content }, ...others]);
    const other = this.render([{ role: "user", content: system + OTHER_WORDS }]);
    const ids = this.encode(whole), before = this.encode(common(whole, other));
    const pinned = common(ids, before).length;
    return { ids, pinned: pinned <= this.keeps ? pinned : 0 };
  }

  render(messages) {
    if (!this.template) throw new Error("this model has no chat template: it completes texts");
    const marks = { bos_token: this.tokenizer.id_to_token(this.bos), add_generation_prompt: true };
    return this.template.render({ messages: messages.map(asTemplate), ...marks });
  }

  encode(text) {
    const { ids } = this.tokenizer.encode(text, { add_special_tokens: false });
    return ids[0] === this.bos ? ids : [this.bos, ...ids];
  }

  /**
   * Feed what the caches do not hold yet, and let every token see the first `pinned` ones in the global layers.
   * Returns the logits (V,) after the last token, null if stopped, and how many were fed.
   */
  async feed(ids, pinned = 0) {
    const known = this.fed.findIndex((id, at) => id !== ids[at]);
    const goesOn = this.fed.length && known < 0 && this.fed.length < ids.length;
    const lost = pinned !== this.pinned && this.fed.length > this.facts.context; // what is pinned now may have slid out
    let from = goesOn && !lost ? this.fed.length : 0; // at 0 the model forgets
    const fed = ids.length - from;
    this.fed = []; // a call that fails or is stopped leaves caches that nobody may go on with
    if (!from) await this.mark(0);
    this.pinned = pinned;
    let logits;
    while (from < ids.length) {
      await this.mark(from >= pinned ? pinned : 0);
      const last = from === ids.length - 1;
      let waiting = last ? 1 : ids.length - 1 - from;
      if (from < pinned) waiting = Math.min(waiting, pinned - from); // only what was written can be marked
      const signature = this.best(waiting, last ? ["decode"] : ["prefill", "decode"]);
      const count = Math.min(waiting, signature.tokens);
      logits = await this.run(signature, ids.slice(from, from + count), from);
      from += count;
      if (!last) await breathe();
      if (!last && this.stopping) return { logits: null, fed };
    }
    this.fed = ids;
    return { logits, fed };
  }

  /** Mark the slots of the first `count` tokens as pinned, and no others: their positions become negative. */
  async mark(count) {
    if (count === this.marked) return;
    this.marked = count;
    for (const name of this.pins) {
      const old = this.caches[name], held = (await this.gpu.during(old.data())).map(Math.abs);
      for (let slot = 0; slot < count; slot++) held[slot] = -held[slot];
      this.caches[name] = new Tensor(held, this.shapes[name]);
      old.delete();
    }
  }

  best(waiting, roles) {
    const worth = ({ tokens }) => Math.min(waiting, tokens) / (tokens + FIXED_COST);
    return this.signatures.filter(({ role }) => roles.includes(role)).reduce((a, b) => (worth(b) > worth(a) ? b : a));
  }

  async run({ runner, tokens: size }, ids, position) {
    if (!this.caches) [this.caches, this.shapes] = zeros(runner);
    const tokens = new Int32Array(size), positions = new Int32Array(size).fill(PADDING);
    tokens.set(ids);
    ids.forEach((_, at) => (positions[at] = position + at));
    const inputs = { tokens: new Tensor(tokens, [1, size]), input_pos: new Tensor(positions, [size]) };
    const { logits, ...caches } = await this.gpu.during(runner.run({ ...inputs, ...this.caches }));
    for (const old of [...Object.values(inputs), ...Object.values(this.caches)]) old.delete();
    this.caches = caches;
    const values = logits && (await this.gpu.during(logits.data())).slice();
    logits?.delete();
    if (values && !values.some((value) => Math.abs(value) > NOTHING)) {
      throw new Error("the model cannot be computed in this browser: all its logits are 0, as where memory did not suffice");
    }
    return values;
  }
}

/** Whether the GPU is still there: calls that wait for one that was lost, as by a driver's crash, may never end. */
class Gpu {
  constructor(device) {
    this.error = null;
    this.fail = () => {};
    device?.lost.then(({ message }) => {
      this.error = new Error(`the GPU was lost (${message || "no reason given"}); load the page again`);
      this.fail(this.error);
    });
  }

  during(call) {
    return new Promise((resolve, reject) => {
      this.fail = reject;
      if (this.error) reject(this.error);
      call.then(resolve, reject);
    });
  }
}

/** Zeros for a model's caches, and their shapes, by name. */
function zeros(runner) {
  const caches = runner.getInputDetails().filter(({ name }) => name.startsWith("kv_cache"));
  const byName = (of) => Object.fromEntries(caches.map((each) => [each.name, of(each)]));
  return [byName(({ shape, dtype }) => zero(dtype, shape)), byName(({ shape }) => [...shape])];
}

function zero(dtype, shape) {
  const elements = shape.reduce((a, b) => a * b);
  return new Tensor(dtype === "int32" ? new Int32Array(elements) : new Float32Array(elements), shape);
}

/** The names of what the slots of layers hold that keep the beginning of a text. */
function pinsByKind(layers) {
  const kinds = [...new Map(layers.map((layer) => [JSON.stringify(layer), layer])).values()];
  return kinds.map(({ pinned }, kind) => pinned && `${HELD}${kind}`).filter(Boolean);
}

/** What two texts, or two lists, begin with alike. */
function common(one, other) {
  let length = 0;
  while (length < one.length && one[length] === other[length]) length += 1;
  return one.slice(0, length);
}

/** Gemma's templates call the model's turn `assistant` in their input. */
const asTemplate = ({ role, content }) => ({ role: role === "model" ? "assistant" : role, content });

/** Let messages in: `stop` waits in the event loop. */
const channel = new MessageChannel();
const breathe = () => new Promise((resolve) => {
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(0);
});

/** Tokens as text, told as soon as no later token can change it. */
class Stream {
  constructor(tokenizer, tell) {
    Object.assign(this, { tokenizer, tell, ids: [], told: 0 });
  }

  add(id) {
    this.ids.push(id);
    const text = this.text();
    if (!text.endsWith("\ufffd")) this.say(text);
  }

  end() {
    this.say(this.text());
  }

  text() {
    return this.tokenizer.decode(this.ids, { skip_special_tokens: true });
  }

  say(text) {
    if (text.length > this.told) this.tell(text.slice(this.told));
    this.told = text.length;
  }
}

