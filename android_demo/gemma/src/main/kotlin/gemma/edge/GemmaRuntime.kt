package gemma.edge

import gemma.edge.engine.EngineApi
import gemma.edge.engine.EngineLibrary
import gemma.edge.engine.EngineOptions
import gemma.edge.engine.Engines
import java.io.File

/**
 * A loaded bundle with one KV cache: you feed tokens and get logits. Its memory never grows. Once more tokens were fed than the
 * bundle's context holds, the oldest fall out of the cache. Calls from several threads wait for each other.
 */
public interface GemmaRuntime : AutoCloseable {
    /** The loaded bundle. */
    public val bundle: Bundle

    /** The backend that runs. */
    public val backend: Backend

    /** The library that runs it. */
    public val library: EngineLibrary

    /** The adapter that computes together with the bundle, if any. */
    public val adapter: Adapter?

    /** The number of tokens fed since the last reset, including those that have fallen out of the cache. */
    public val position: Int

    /** The number of tokens at the beginning that every later one sees in the global layers; [pin] sets it. */
    public val pinned: Int

    /** The ids of the tokens fed since the last reset; only the last few thousand are kept. */
    public val ids: IntArray

    /**
     * Append tokens at the current position, in chunks of at most the backend's `prefillChunk`.
     *
     * @param ids at least one token, each below the vocabulary's size.
     * @return the logits after the last token, one for each token of the vocabulary. The next call overwrites this array.
     * @throws InputException there is no token, or one that is not in the vocabulary. The cache is unchanged.
     */
    public fun prefill(ids: IntArray): FloatArray

    /** Append one token and return the logits after it, like [prefill]. */
    public fun decode(token: Int): FloatArray

    /** Forget all tokens. The next token is fed at position 0. */
    public fun reset()

    /**
     * Let every token see the first [count] ones of its text in the global layers, however far back they are; 0 pins nothing. They may
     * be fed before or afterwards. Once the text is longer than the context, another number than before begins at position 0.
     *
     * @throws InputException the bundle does not keep so many: `gemma-export --pinned` says how many it keeps.
     */
    public fun pin(count: Int)

    /**
     * Compute with an adapter from now on, or with the bundle alone. Another one than before begins at position 0. The first one takes as
     * long as opening the bundle, a switch to another one only the copying of its factors.
     *
     * @throws UnsupportedException the backend takes no adapters; the message names it.
     * @throws AdapterException it was made for another bundle, or was changed. The runtime then computes as before.
     * @throws NotEnoughMemoryException the device has too little free memory for it.
     */
    public fun useAdapter(adapter: Adapter?)

    /**
     * Take back the last [count] tokens: what follows is as if they had never been fed. This costs nothing as long as the cache holds
     * every key that is needed from there on. If it does not, the remaining tokens are fed again.
     *
     * @throws InputException [count] is negative, or larger than the number of tokens that are remembered.
     */
    public fun rewind(count: Int)

    /**
     * Write the state to a file, which the same backend of the same bundle can [load] again, and the Python runtime too: the tokens and
     * the rows of the cache that are in use. ExecuTorch's library cannot hand out its cache, so its backend saves the tokens only. The
     * file is written whole or not at all.
     *
     * @param notes a JSON object that is saved with the state.
     * @throws java.io.IOException the file cannot be written.
     */
    public fun save(file: File, notes: String = "{}")

    /**
     * Continue from a saved state. Nothing is fed, except by the ExecuTorch backend and from a file without a cache: then the saved
     * tokens are fed again.
     *
     * @return the notes that were saved with the state.
     * @throws StateException the file is missing, damaged, or of another bundle or adapter. The runtime is unchanged, or empty if the file could
     *   not be read to its end.
     */
    public fun load(file: File): String

    public companion object {
        /**
         * Load a bundle. This takes seconds, so do not call it on a main thread.
         *
         * @param backend the backend to run; null takes the first one that has an engine on the class path: ExecuTorch, LiteRT, ONNX.
         * @param threads number of threads; null takes one per big core, but no more than the bundle's target has.
         * @param cacheDir folder of the app for files that make the next start faster; null keeps none.
         * @param device the device, whose free memory is compared with the backend's plan before anything is loaded.
         * @param accelerator what computes: `cpu`, or `gpu` for a TFLite backend that was made for it; null takes what it was made for.
         *   There is no silent way back to the CPU.
         * @throws BundleException the files are not what the manifest says.
         * @throws NotEnoughMemoryException the device has too little free memory.
         * @throws UnsupportedException the bundle does not hold the backend, its engine is not on the class path, or the engine or
         *   the accelerator does not run on this device. The message names the dependency to add, or the way out.
         * @throws InputException [threads] is below 1.
         */
        @OptIn(EngineApi::class)
        public fun open(
            bundle: Bundle,
            backend: String? = null,
            threads: Int? = null,
            cacheDir: File? = null,
            device: Device = Device.current(),
            accelerator: String? = null,
        ): GemmaRuntime {
            if (threads != null && threads < 1) throw InputException("threads $threads is below 1")
            val (chosen, engine) = Engines.choose(bundle, backend)
            val used = Engines.accelerator(bundle, chosen, accelerator)
            device.requireMemoryFor(bundle, chosen)
            return engine.open(bundle, chosen, EngineOptions(threads ?: device.threadsFor(bundle), cacheDir, used))
        }

        /** The backends that have an engine on the class path, in the order in which [open] tries them. */
        @OptIn(EngineApi::class)
        public fun available(): List<String> = Engines.entries.filter { it.find() != null }.map { it.backend }
    }
}
