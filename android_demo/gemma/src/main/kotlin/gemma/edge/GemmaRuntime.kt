package gemma.edge

import java.io.File

/**
 * A loaded bundle with one KV cache: you feed tokens and get logits. Its memory never grows. Once more tokens were fed than the
 * bundle's context holds, the oldest fall out of the cache. Calls from several threads wait for each other.
 */
public interface GemmaRuntime : AutoCloseable {
    /** The loaded bundle. */
    public val bundle: Bundle

    /** The number of tokens fed since the last reset, including those that have fallen out of the cache. */
    public val position: Int

    /** The ids of the tokens fed since the last reset; only the last few thousand are kept. */
    public val ids: IntArray

    /**
     * Append tokens at the current position, in chunks of at most the bundle's `prefillChunk`.
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
     * Write the state, which is the tokens and the cache, to a file. The same bundle can [load] it again, here or in the Python runtime.
     * The file holds only the rows of the cache that are in use, and is written whole or not at all.
     *
     * @param notes a JSON object that is saved with the state.
     * @throws java.io.IOException the file cannot be written.
     */
    public fun save(file: File, notes: String = "{}")

    /**
     * Continue from a saved state; nothing is fed.
     *
     * @return the notes that were saved with the state.
     * @throws StateException the file is missing, damaged or of another bundle. The runtime is unchanged, or empty if the file could
     *   not be read to its end.
     */
    public fun load(file: File): String
}
