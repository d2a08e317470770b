// A bundle in LiteRT.js: tokens into signatures, caches from call to call, text out. Runs in worker.js.
import { Template } from "./jinja.js";
import { getWebGpuDevice, loadAndCompile, loadLiteRt, supportsFeature, Tensor } from "./litert.js";
import { sampler } from "./sampling.js";
import { stored } from "./store.js";
import { Tokenizer } from "./tokenizers.js";

const FIXED_COST = 16; // of a call, in tokens: as in bundle/signature.py
const PADDING = -1; // position of a token that fills up a call
const MAX_THREADS = 4;
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
    const { plan, settings } = manifest.backends.web;
    this.bos = manifest.config.bos_token_id;
    this.ends = new Set(manifest.config.eos_token_id);
    this.signatures = settings.signatures.map((each) => ({ ...each, runner: model.signatures[each.name] }));
    this.tokenizer = tokenizer;
    this.template = template ? new Template(template) : null;
    this.facts = { name: manifest.model.name, chats: Boolean(template), context: plan.context, ...used };
    this.caches = null; // tensors by name
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
    const { logits: first, fed } = await this.feed(this.ids(prompt));
    let logits = first;
    const answering = performance.now(), tokens = [], text = new Stream(this.tokenizer, tell);
    while (logits && tokens.length < maxTokens && !this.stopping) {
      const id = choose(logits);
      if (this.ends.has(id)) break;
      tokens.push(id);
      text.add(id);
      if (tokens.length < maxTokens) ({ logits } = await this.feed([...this.fed, id]));
      await breathe();
    }
    text.end();
    const ended = performance.now();
    return { promptTokens: fed, tokens, prefillMs: answering - started, decodeMs: ended - answering, stopped: this.stopping };
  }

  ids({ text, messages }) {
    if (messages && !this.template) throw new Error("this model has no chat template: it completes texts");
    const marks = { bos_token: this.tokenizer.id_to_token(this.bos), add_generation_prompt: true };
    const whole = messages ? this.template.render({ messages: messages.map(asTemplate), ...marks }) : text;
    const { ids } = this.tokenizer.encode(whole, { add_special_tokens: false });
    return ids[0] === this.bos ? ids : [this.bos, ...ids];
  }

  /** Feed what the caches do not hold yet; the logits (V,) after the last token, null if stopped, and how many were fed. */
  async feed(ids) {
    const known = this.fed.findIndex((id, at) => id !== ids[at]);
    let from = this.fed.length && known < 0 && this.fed.length < ids.length ? this.fed.length : 0; // at 0 the model forgets
    const fed = ids.length - from;
    this.fed = []; // a call that fails or is stopped leaves caches that nobody may go on with
    let logits;
    while (from < ids.length) {
      const last = from === ids.length - 1;
      const waiting = last ? 1 : ids.length - 1 - from;
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

  best(waiting, roles) {
    const worth = ({ tokens }) => Math.min(waiting, tokens) / (tokens + FIXED_COST);
    return this.signatures.filter(({ role }) => roles.includes(role)).reduce((a, b) => (worth(b) > worth(a) ? b : a));
  }

  async run({ runner, tokens: size }, ids, position) {
    this.caches ??= zeros(runner);
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

function zeros(runner) {
  const caches = runner.getInputDetails().filter(({ name }) => name.startsWith("kv_cache"));
  return Object.fromEntries(caches.map(({ name, shape, dtype }) => [name, zero(dtype, shape)]));
}

function zero(dtype, shape) {
  const elements = shape.reduce((a, b) => a * b);
  return new Tensor(dtype === "int32" ? new Int32Array(elements) : new Float32Array(elements), shape);
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

