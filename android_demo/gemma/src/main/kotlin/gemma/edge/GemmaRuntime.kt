package gemma.edge

/**
 * A loaded bundle with one KV cache: tokens in, logits out, in a memory that never grows. Past the bundle's context the oldest
 * tokens fall out of the cache; nothing else changes. Calls from several threads wait for each other.
 */
public interface GemmaRuntime : AutoCloseable {
    /** What was loaded. */
    public val bundle: Bundle

    /** Tokens fed since the last reset, also those that have fallen out of the cache. */
    public val position: Int

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
}
