package gemma.edge

/**
 * The speed and length of one answer.
 *
 * @property promptTokens tokens that were fed before the answer.
 * @property newTokens tokens of the answer, without the stop token.
 * @property ttftMs milliseconds until the first token, or until the end of an answer without tokens.
 * @property decodeTokensPerS tokens per second after the first one; 0 if there was at most one.
 */
public data class AnswerStats(
    public val promptTokens: Int,
    public val newTokens: Int,
    public val ttftMs: Double,
    public val decodeTokensPerS: Double,
) {
    /** Prompt tokens per second; the time includes the sampling of the first token. */
    public val prefillTokensPerS: Double get() = promptTokens * 1e3 / ttftMs
}

/** Measures one answer; the time starts when the clock is created. */
internal class AnswerClock(private val promptTokens: Int) {
    private val start = System.nanoTime()
    private var first = 0L
    private var last = 0L
    private var tokens = 0

    /** Count a token, which was sampled just now. */
    fun token() {
        last = System.nanoTime()
        if (tokens++ == 0) first = last
    }

    fun stats(): AnswerStats {
        val ttft = (if (tokens > 0) first else System.nanoTime()) - start
        return AnswerStats(promptTokens, tokens, ttft / 1e6, if (tokens > 1) (tokens - 1) * 1e9 / (last - first) else 0.0)
    }
}
