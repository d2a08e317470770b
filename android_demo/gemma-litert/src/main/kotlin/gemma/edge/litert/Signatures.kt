package gemma.edge.litert

import gemma.edge.Signature

/** One call: [count] tokens from [start] of those that wait. */
internal data class Call(val signature: Signature, val start: Int, val count: Int)

/** Chooses the signatures that work off a text in the shortest time. `SignatureRuntime` in runtimes/engines/signatures.py does the same. */
internal class Signatures(private val all: List<Signature>) {
    /**
     * The calls that feed [count] tokens from [position] on. The last one gives the logits of the last token. No call goes on behind the
     * [pinned] tokens, because only what was written can be marked.
     */
    fun calls(position: Int, count: Int, pinned: Int = 0): List<Call> {
        val calls = ArrayList<Call>()
        var start = 0
        while (start < count - 1) {
            val best = best(all, position + start, count - 1 - start)
            val room = if (position + start < pinned) pinned - position - start else Int.MAX_VALUE
            calls += Call(best, start, minOf(count - 1 - start, best.tokens, room))
            start += calls.last().count
        }
        calls += Call(best(all.filter { !it.prefills }, position + count - 1, 1), count - 1, 1)
        return calls
    }

    private fun best(candidates: List<Signature>, position: Int, waiting: Int): Signature = candidates
        .filter { it.longest == null || position + minOf(waiting, it.tokens) <= it.longest!! }
        .reduce { best, next -> if (compareValuesBy(next, best, { worth(it, waiting) }, { it.longest != null }) > 0) next else best }

    private fun worth(signature: Signature, waiting: Int) = minOf(waiting, signature.tokens).toDouble() / (signature.tokens + FIXED_COST)

    private companion object {
        // FIXED_COST: what a call costs beside its tokens, in tokens: reading the weights takes as long as computing about 16 tokens.
        const val FIXED_COST = 16
    }
}
