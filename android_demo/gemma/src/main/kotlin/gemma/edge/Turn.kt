package gemma.edge

/** Stands for what a user says: no text begins with it. */
internal const val OTHER_WORDS = "\uFFFD"

/**
 * The text in the cache.
 *
 * @property texts the text, in every form in which a template may write it; empty if the text is not known.
 * @property position the runtime's position after the text.
 * @property pending the last tokens of the text, which were not fed yet.
 */
internal class CachedText(val texts: Set<String>, val position: Int, val pending: IntArray) {
    companion object {
        val NOTHING = CachedText(emptySet(), 0, IntArray(0))
    }
}

/**
 * How many tokens of a conversation come before the user's own words. `beginning` in runtimes/generation/turn.py does the same.
 *
 * @param ids the conversation as tokens.
 * @param prompt the conversation as text.
 * @param other the text of one that begins in the same way, and whose user says [OTHER_WORDS].
 * @param encode from text to tokens.
 */
internal fun beginning(ids: IntArray, prompt: String, other: String, encode: (String) -> IntArray): Int {
    val shared = encode(prompt.commonPrefixWith(other))
    return shared.indices.firstOrNull { it >= ids.size || ids[it] != shared[it] } ?: shared.size
}
