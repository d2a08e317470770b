package gemma.edge

/**
 * One answer in numbers.
 *
 * @property promptTokens tokens read before it.
 * @property newTokens tokens of the answer, without the stop token.
 * @property ttftMs milliseconds from the beginning to its first token; to its end where it has none.
 * @property decodeTokensPerS tokens per second after the first one; 0 when there was at most one.
 */
public data class AnswerStats(
    public val promptTokens: Int,
    public val newTokens: Int,
    public val ttftMs: Double,
    public val decodeTokensPerS: Double,
) {
    /** Prompt tokens per second, the first token's sampling included. */
    public val prefillTokensPerS: Double get() = promptTokens * 1e3 / ttftMs
}

/** Takes the times of one answer, from when it is made. */
internal class AnswerClock(private val promptTokens: Int) {
    private val start = System.nanoTime()
    private var first = 0L
    private var last = 0L
    private var tokens = 0

    /** A token was chosen. */
    fun token() {
        last = System.nanoTime()
        if (tokens++ == 0) first = last
    }

    fun stats(): AnswerStats {
        val ttft = (if (tokens > 0) first else System.nanoTime()) - start
        return AnswerStats(promptTokens, tokens, ttft / 1e6, if (tokens > 1) (tokens - 1) * 1e9 / (last - first) else 0.0)
    }
}
