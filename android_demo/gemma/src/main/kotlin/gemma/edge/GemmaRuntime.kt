package gemma.edge

import java.io.File

/**
 * A loaded bundle with one KV cache: tokens in, logits out, in a memory that never grows. Past the bundle's context the oldest
 * tokens fall out of the cache; nothing else changes. Calls from several threads wait for each other.
 */
public interface GemmaRuntime : AutoCloseable {
    /** What was loaded. */
    public val bundle: Bundle

    /** Tokens fed since the last reset, also those that have fallen out of the cache. */
    public val position: Int

    /** The last tokens fed: all of them, up to a few thousand. */
    public val ids: IntArray

    /**
     * Append tokens at the current position, in chunks of at most the bundle's `prefillChunk`.
     *
     * @param ids at least one token, each below the vocabulary's size.
     * @return logits after the last of them, one for each token of the vocabulary; overwritten by the next call.
     * @throws InputException no token, or one that the vocabulary does not hold; the cache is then as before.
     */
    public fun prefill(ids: IntArray): FloatArray

    /** Append one token; as [prefill] otherwise. */
    public fun decode(token: Int): FloatArray

    /** Forget everything: the next token is at position 0. */
    public fun reset()

    /**
     * Write the state, tokens and cache, to a file that this bundle can [load] again, here or in the Python runtime. As large as the
     * rows of the cache in use; the file appears whole or not at all.
     *
     * @param notes more to keep with it, as a JSON object.
     * @throws java.io.IOException it cannot be written.
     */
    public fun save(file: File, notes: String = "{}")

    /**
     * Go on from a saved state; nothing is fed.
     *
     * @return the notes that were kept with it.
     * @throws StateException no such file, damaged, or another bundle's; the runtime is then as before, or empty if the file could not
     *   be read to its end.
     */
    public fun load(file: File): String
}
