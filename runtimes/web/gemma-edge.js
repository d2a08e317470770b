// The API, in the page's thread. The types and what they mean are in gemma-edge.d.ts; worker.js computes.

export async function load(url, { threads, accelerator, onProgress } = {}) {
  const worker = new Worker(new URL("worker.js", import.meta.url)); // a classic one: LiteRT.js calls importScripts
  const calls = new Calls(worker, onProgress);
  try {
    const facts = await calls.result({ call: "open", url: new URL(url, location.href).href, threads, accelerator });
    return new Model(calls, facts);
  } catch (error) {
    worker.terminate();
    throw error;
  }
}

/** Questions to the worker, and the answers that come back, by number. */
class Calls {
  constructor(worker, onProgress = () => {}) {
    this.worker = worker;
    this.waiting = new Map();
    this.next = 0;
    worker.onmessage = ({ data }) => (data.progress ? onProgress(data.progress) : this.waiting.get(data.number)?.(data));
    worker.onerror = (event) => {
      for (const tell of this.waiting.values()) tell({ error: `the worker could not go on: ${event.message}` });
    };
  }

  /** Every message that answers a question, until one says that it is the last. */
  async *answers(question) {
    const number = this.next++;
    const arrived = [];
    let wake = () => {};
    this.waiting.set(number, (message) => {
      arrived.push(message);
      wake();
    });
    this.worker.postMessage({ number, ...question });
    try {
      for (;;) {
        while (!arrived.length) await new Promise((resolve) => (wake = resolve));
        const message = arrived.shift();
        if (message.error) throw new Error(message.error);
        yield message;
        if ("result" in message) return;
      }
    } finally {
      this.waiting.delete(number);
    }
  }

  async result(question) {
    for await (const message of this.answers(question)) if ("result" in message) return message.result;
  }
}

class Model {
  constructor(calls, facts) {
    this.calls = calls;
    this.name = facts.name;
    this.chats = facts.chats;
    this.context = facts.context;
    this.threads = facts.threads;
    this.accelerator = facts.accelerator;
  }

  session({ system = "" } = {}) {
    return new Session(this.calls, system);
  }

  close() {
    this.calls.worker.terminate();
  }
}

class Session {
  constructor(calls, system) {
    this.calls = calls;
    this.system = system;
    this.messages = [];
    this.stats = null;
  }

  async *chat(message, options = {}) {
    const before = this.messages, own = [...before, { role: "user", content: message }];
    this.messages = own; // others after a reset, which forgets this answer, too
    let answer = "";
    try {
      for await (const piece of this.answer({ messages: [...own], system: this.system }, options)) {
        answer += piece;
        yield piece;
      }
    } catch (error) {
      if (this.messages === own) this.messages = before; // as if it had not been asked
      throw error;
    } finally {
      if (this.messages === own) own.push({ role: "model", content: answer });
    }
  }

  async *complete(text, options = {}) {
    this.reset();
    yield* this.answer({ text }, options);
  }

  async *answer(prompt, options) {
    let ended = false;
    try {
      for await (const message of this.calls.answers({ call: "generate", prompt, options })) {
        if (message.piece) yield message.piece;
        if (message.result) this.stats = message.result;
      }
      ended = true;
    } finally {
      if (!ended) this.stop(); // the caller has left its loop
    }
  }

  stop() {
    this.calls.worker.postMessage({ call: "stop" });
  }

  reset() {
    this.messages = [];
  }
}
