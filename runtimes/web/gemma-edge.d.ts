/** Runs a web bundle of gemma-edge in the page that imports this, in a worker of its own. */

/** How far loading is. The weights come over the network once; afterwards they lie in the browser's storage. */
export interface Progress {
  stage: "download" | "check" | "compile";
  done: number; // bytes
  total: number; // bytes
}

export interface LoadOptions {
  /** Threads of the matrix products: more than one only in a page that is cross-origin isolated. Default: up to 4. */
  threads?: number;
  /** What computes: WebAssembly, or the GPU by WebGPU. There is no silent way back from the GPU. Default: "wasm". */
  accelerator?: "wasm" | "webgpu";
  onProgress?: (progress: Progress) => void;
}

export interface SessionOptions {
  /**
   * Text in front of the first message, because Gemma has no turn of the system's own. It stays visible when the conversation is
   * longer than the context, if it is not longer than what the model keeps. Default: none.
   */
  system?: string;
}

export interface GenerationOptions {
  maxTokens?: number; // default 256
  temperature?: number; // default 0, which takes the likeliest token
  topK?: number; // default 0, which considers all tokens
  topP?: number; // default 1
  seed?: number; // default: another one for each answer
}

/** Of the last answer. */
export interface Stats {
  promptTokens: number; // that had to be fed
  tokens: number[]; // ids of the answer
  prefillMs: number;
  decodeMs: number;
  stopped: boolean; // by stop()
}

/** One conversation. Only one answer is computed at a time, for all sessions of a model. */
export interface Session {
  /** Answer a message of the user, with everything said before in mind; yields pieces of text. */
  chat(message: string, options?: GenerationOptions): AsyncIterableIterator<string>;
  /** Go on with a text as it is, without the form of a chat, and forget everything before. */
  complete(text: string, options?: GenerationOptions): AsyncIterableIterator<string>;
  /** End the answer within one token. */
  stop(): void;
  /** Forget the conversation. */
  reset(): void;
  readonly stats: Stats | null;
}

export interface Model {
  readonly name: string;
  /** Whether the model has a chat template; one without can only complete(). */
  readonly chats: boolean;
  /** Tokens that the model looks back on. */
  readonly context: number;
  readonly threads: number;
  readonly accelerator: "wasm" | "webgpu";
  session(options?: SessionOptions): Session;
  /** End the worker and give its memory back. */
  close(): void;
}

/**
 * Load the bundle at a folder's address.
 *
 * @throws Error whose message is one sentence for the user: no network, no room in the browser's storage, a damaged file, or a
 * browser that is too old.
 */
export function load(url: string | URL, options?: LoadOptions): Promise<Model>;
