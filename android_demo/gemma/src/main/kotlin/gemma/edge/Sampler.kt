package gemma.edge

import kotlin.math.exp
import kotlin.random.Random

/**
 * How the next token is chosen. By default the most likely token is chosen.
 *
 * @property temperature 0 always chooses the most likely token and ignores the filters; any other value must be at least 0.000001.
 * @property topK only this many of the most likely tokens are kept; 0 keeps all.
 * @property topP only the most likely tokens whose probabilities sum to this are kept; 1 keeps all.
 * @property minP tokens are dropped whose probability is below this fraction of the highest one; 0 drops none.
 * @property repetitionPenalty a value above 1 makes tokens of the context less likely, at any temperature; 1 has no effect.
 * @property seed the same seed gives the same tokens; null gives different ones each time.
 * @throws InputException a number is out of range.
 */
public data class SamplingParams(
    public val temperature: Double = 0.0,
    public val topK: Int = 0,
    public val topP: Double = 1.0,
    public val minP: Double = 0.0,
    public val repetitionPenalty: Double = 1.0,
    public val seed: Long? = null,
) {
    init {
        // each condition says what is allowed, so that NaN is refused too
        require(temperature == 0.0 || temperature in MIN_TEMPERATURE..MAX_NUMBER) {
            "temperature $temperature is neither 0, which is greedy, nor at least $MIN_TEMPERATURE"
        }
        require(topK >= 0) { "topK $topK is below 0; 0 keeps every token" }
        require(topP > 0 && topP <= 1) { "topP $topP is not above 0 and at most 1; 1 keeps every token" }
        require(minP in 0.0..1.0) { "minP $minP is not between 0 and 1; 0 keeps every token" }
        require(repetitionPenalty > 0 && repetitionPenalty <= MAX_NUMBER) {
            "repetitionPenalty $repetitionPenalty is not a number above 0; 1 has no effect"
        }
    }

    private inline fun require(allowed: Boolean, message: () -> String) {
        if (!allowed) throw InputException(message())
    }

    private companion object {
        // MIN_TEMPERATURE: the smallest temperature above 0; logits / temperature must stay finite.
        const val MIN_TEMPERATURE = 1e-6

        // MAX_NUMBER: the largest temperature and penalty; it still fits into a float.
        const val MAX_NUMBER = 1e38
    }
}

/** The tokens that pass every filter, and their probabilities, which sum to 1. */
internal class Distribution(val ids: IntArray, val probabilities: DoubleArray)

/**
 * Chooses a token by its logits. It applies repetition penalty, temperature, top-k, top-p and min-p in this order, like transformers.
 * It never sorts the whole vocabulary. Source of the semantics: transformers/generation/logits_process.py.
 *
 * @param seen ids of the tokens in the context.
 */
internal class Sampler(private val params: SamplingParams, private val seen: MutableSet<Int> = HashSet()) {
    private val random = params.seed?.let(::Random) ?: Random.Default

    /** Note that a token was added to the context. */
    fun observe(id: Int) {
        seen.add(id)
    }

    /** Choose the next token. The logits are not changed. */
    fun sample(logits: FloatArray): Int {
        val scores = penalized(logits)
        val best = scores.indexOfLargest()
        if (!scores[best].isFinite()) {
            throw BundleException("the bundle computes logits that are not finite; its weights are damaged")
        }
        if (params.temperature == 0.0) return best
        val kept = kept(scores)
        val drawn = random.nextDouble()
        var sum = 0.0
        for (i in kept.ids.indices) {
            sum += kept.probabilities[i]
            if (drawn < sum) return kept.ids[i]
        }
        return kept.ids.last()
    }

    /** The distribution from which [sample] draws at a temperature above 0. */
    fun distribution(logits: FloatArray): Distribution = kept(penalized(logits))

    private fun penalized(logits: FloatArray): FloatArray {
        if (params.repetitionPenalty == 1.0) return logits
        val scores = logits.copyOf()
        val penalty = params.repetitionPenalty.toFloat()
        for (id in seen) scores[id] = if (scores[id] < 0) scores[id] * penalty else scores[id] / penalty
        return scores
    }

    private fun kept(logits: FloatArray): Distribution {
        val temperature = params.temperature.toFloat()
        val scores = FloatArray(logits.size) { logits[it] / temperature }
        val largest = scores.max()
        var ids = if (params.topK in 1 until scores.size) topK(scores, params.topK) else IntArray(scores.size) { it }
        var weights = FloatArray(ids.size) { exp(scores[ids[it]] - largest) }
        fun keep(which: IntArray) {
            ids = IntArray(which.size) { ids[which[it]] }
            weights = FloatArray(which.size) { weights[which[it]] }
        }
        if (params.topP < 1) keep(topP(weights, params.topP))
        if (params.minP > 0) {
            val minWeight = params.minP.toFloat() * weights.max()
            keep(weights.indices.filter { weights[it] >= minWeight }.toIntArray())
        }
        val total = weights.sumOf { it.toDouble() }
        return Distribution(ids, DoubleArray(weights.size) { weights[it] / total })
    }

    /** Indices of the [k] largest scores and of all that equal the smallest of these, like transformers. */
    private fun topK(scores: FloatArray, k: Int): IntArray {
        val heap = FloatArray(k) { Float.NEGATIVE_INFINITY } // the largest scores so far; the smallest of them is at the top
        for (score in scores) if (score > heap[0]) heap.replaceTop(score)
        return scores.indicesAtLeast(heap[0])
    }

    /** Indices of the fewest largest weights whose sum reaches the fraction [p] of all, the largest weight first. */
    private fun topP(weights: FloatArray, p: Double): IntArray {
        val total = weights.sumOf { it.toDouble() }
        // V weights below this bound sum to less than (1 - p) * total, so none of them is needed, and only the others are sorted
        val candidates = weights.indicesAtLeast(((1 - p) * total / weights.size).toFloat())
        val sorted = candidates.sortedByDescending { weights[it] } // stable, like numpy's
        var sum = 0.0
        val count = sorted.indexOfFirst { sum += weights[it]; sum >= p * total }
        return (if (count < 0) sorted else sorted.subList(0, count + 1)).toIntArray()
    }
}

/** The index of the largest number, or of the first NaN if there is one. Of equal numbers the first counts. */
internal fun FloatArray.indexOfLargest(): Int {
    var best = 0
    for (i in indices) {
        if (this[i].isNaN()) return i
        if (this[i] > this[best]) best = i
    }
    return best
}

private fun FloatArray.indicesAtLeast(bound: Float): IntArray {
    var count = 0
    for (value in this) if (value >= bound) count++
    val result = IntArray(count)
    count = 0
    for (i in indices) if (this[i] >= bound) result[count++] = i
    return result
}

/** Replace the smallest number, which is at the top of this heap, by [value]. */
private fun FloatArray.replaceTop(value: Float) {
    var at = 0
    while (true) {
        var child = 2 * at + 1
        if (child >= size) break
        if (child + 1 < size && this[child + 1] < this[child]) child++
        if (this[child] >= value) break
        this[at] = this[child]
        at = child
    }
    this[at] = value
}
