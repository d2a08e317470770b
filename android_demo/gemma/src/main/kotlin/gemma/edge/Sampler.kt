package gemma.edge

import kotlin.math.exp
import kotlin.random.Random

/**
 * How the next token is chosen; the default takes the most likely one.
 *
 * @property temperature 0 is greedy, and the filters are then without effect; else at least 0.000001.
 * @property topK keep that many of the most likely; 0 keeps all.
 * @property topP keep the fewest most likely whose probabilities reach it; 1 keeps all.
 * @property minP drop what is less likely than this times the most likely; 0 drops nothing.
 * @property repetitionPenalty above 1 makes what the context holds less likely, greedy or not; 1 is off.
 * @property seed makes sampling repeatable; null is different every time.
 * @throws InputException a number that no filter can take.
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
        // written as `allowed or refuse`, so that NaN is refused too
        require(temperature == 0.0 || temperature in COLDEST..HOTTEST) {
            "temperature $temperature is neither 0, which is greedy, nor at least $COLDEST"
        }
        require(topK >= 0) { "topK $topK is below 0; 0 keeps every token" }
        require(topP > 0 && topP <= 1) { "topP $topP is not above 0 and at most 1; 1 keeps every token" }
        require(minP in 0.0..1.0) { "minP $minP is not between 0 and 1; 0 keeps every token" }
        require(repetitionPenalty > 0 && repetitionPenalty <= HOTTEST) {
            "repetitionPenalty $repetitionPenalty is not a number above 0; 1 is off"
        }
    }

    private inline fun require(allowed: Boolean, message: () -> String) {
        if (!allowed) throw InputException(message())
    }

    private companion object {
        const val COLDEST = 1e-6 // logits / temperature must stay finite
        const val HOTTEST = 1e38
    }
}

/** Tokens that pass every filter, and their probabilities, which sum to 1. */
internal class Distribution(val ids: IntArray, val probabilities: DoubleArray)

/**
 * From logits to one token: repetition penalty, temperature, top-k, top-p and min-p, in that order, as transformers does. Nothing
 * sorts the vocabulary; only the tokens that stay are sorted. Source of the semantics: transformers/generation/logits_process.py.
 *
 * @param seen tokens that the context holds already.
 */
internal class Sampler(private val params: SamplingParams, private val seen: MutableSet<Int> = HashSet()) {
    private val random = params.seed?.let(::Random) ?: Random.Default

    /** Tell which token was added to the context. */
    fun observe(id: Int) {
        seen.add(id)
    }

    /** Choose the next token; the logits are left as they are. */
    fun sample(logits: FloatArray): Int {
        val scores = penalized(logits)
        val best = scores.indexOfLargest()
        if (!scores[best].isFinite()) {
            throw BundleException("the bundle computes logits that are no finite numbers; its weights are damaged")
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

    /** What [sample] draws from at a temperature above 0. */
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
            val least = params.minP.toFloat() * weights.max()
            keep(weights.indices.filter { weights[it] >= least }.toIntArray())
        }
        val total = weights.sumOf { it.toDouble() }
        return Distribution(ids, DoubleArray(weights.size) { weights[it] / total })
    }

    /** Indices of the [k] largest and of what ties with the last of them, as transformers does. */
    private fun topK(scores: FloatArray, k: Int): IntArray {
        val heap = FloatArray(k) { Float.NEGATIVE_INFINITY } // of the largest so far, the least at the top
        for (score in scores) if (score > heap[0]) heap.replaceTop(score)
        return scores.indicesAtLeast(heap[0])
    }

    /** Indices of the fewest largest weights whose sum reaches [p] of the whole, the largest first. */
    private fun topP(weights: FloatArray, p: Double): IntArray {
        val total = weights.sumOf { it.toDouble() }
        // less than V x this, so less than (1 - p) of the whole, is left out here: only what is near gets sorted
        val near = weights.indicesAtLeast(((1 - p) * total / weights.size).toFloat())
        val sorted = near.sortedByDescending { weights[it] } // stable, as numpy's
        var sum = 0.0
        val count = sorted.indexOfFirst { sum += weights[it]; sum >= p * total }
        return (if (count < 0) sorted else sorted.subList(0, count + 1)).toIntArray()
    }
}

/** The index of the largest, the first of equals; the first NaN if there is one. */
internal fun FloatArray.indexOfLargest(): Int {
    var best = 0
    for (i in indices) {
        if (this[i].isNaN()) return i
        if (this[i] > this[best]) best = i
    }
    return best
}

private fun FloatArray.indicesAtLeast(least: Float): IntArray {
    var count = 0
    for (value in this) if (value >= least) count++
    val found = IntArray(count)
    count = 0
    for (i in indices) if (this[i] >= least) found[count++] = i
    return found
}

/** Put [value] in the place of the least, in a heap whose top is the least. */
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
