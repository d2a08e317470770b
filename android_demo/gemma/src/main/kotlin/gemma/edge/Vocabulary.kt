package gemma.edge

/**
 * A polynomial hash of bytes, modulo 2^64. That of two texts in a row follows from theirs, so that a pair of tokens is looked up
 * without being written anywhere.
 */
internal object TextHash {
    private const val BASE = -0x61c8864680b583ebL // 2^64 / golden ratio; odd
    private val powers = LongArray(1 shl 8).also { it[0] = 1 }.also { for (i in 1 until it.size) it[i] = it[i - 1] * BASE }

    fun of(bytes: ByteArray, start: Int, end: Int): Long {
        var hash = 0L
        for (i in start until end) hash = hash * BASE + (bytes[i].toInt() and 0xFF) + 1
        return hash
    }

    /** The hash of a text followed by another one of so many bytes. */
    fun joined(left: Long, right: Long, rightLength: Int): Long = left * power(rightLength) + right

    /** Spread over all bits: tables are indexed with the low ones. */
    fun mixed(hash: Long): Long {
        val spread = (hash xor (hash ushr 32)) * BASE
        return spread xor (spread ushr 29)
    }

    private fun power(exponent: Int): Long {
        var rest = exponent
        var power = 1L
        while (rest >= powers.size) {
            power *= powers[powers.size - 1]
            rest -= powers.size - 1
        }
        return power * powers[rest]
    }
}

/**
 * The texts of all tokens as UTF-8 in one array, found by an open hash table: 256,000 strings would take 20 MB and a garbage
 * collector's time.
 *
 * @param expected about how many tokens there will be.
 */
internal class Vocabulary(expected: Int = 1 shl 9) {
    private var text = ByteArray(8 * expected + 64)
    private var used = 0
    private var starts = IntArray(expected)
    private var lengths = IntArray(expected) { ABSENT }
    private var hashes = LongArray(expected)
    private var table = IntArray(tableSize(2L * expected)) // id + 1; 0 is empty
    private var count = 0

    /** Add a token; of two with the same text the first is found. */
    fun add(id: Int, bytes: ByteArray, start: Int, end: Int) {
        if (id !in 0 until MOST) throw JsonException("token id $id is not below $MOST")
        if (id >= starts.size) growIds(id)
        if (lengths[id] != ABSENT) throw JsonException("token id $id is there twice")
        if (used + end - start > text.size) text = text.copyOf(maxOf(2 * text.size, used + end - start))
        bytes.copyInto(text, used, start, end)
        starts[id] = used
        lengths[id] = end - start
        hashes[id] = TextHash.of(bytes, start, end)
        used += end - start
        if (2 * ++count > table.size) growTable() else insert(id)
    }

    /** The id of a text, or -1. */
    fun find(bytes: ByteArray, start: Int, end: Int): Int {
        val hash = TextHash.of(bytes, start, end)
        return find(hash) { id -> lengths[id] == end - start && same(id, 0, bytes, start, end) }
    }

    fun find(word: String): Int = word.toByteArray().let { find(it, 0, it.size) }

    /** The text of a token as UTF-8; null for an id without one. */
    fun bytes(id: Int): ByteArray? =
        if (id in lengths.indices && lengths[id] != ABSENT) text.copyOfRange(starts[id], starts[id] + lengths[id]) else null

    /** The hash of a token's text. */
    fun hash(id: Int): Long = hashes[id]

    /** The id of the text of [left] followed by that of [right], or -1. */
    fun joined(left: Int, right: Int): Int {
        val middle = lengths[left]
        val length = middle + lengths[right]
        return find(TextHash.joined(hashes[left], hashes[right], lengths[right])) { id ->
            lengths[id] == length && same(id, 0, text, starts[left], starts[left] + middle) &&
                same(id, middle, text, starts[right], starts[right] + lengths[right])
        }
    }

    private inline fun find(hash: Long, matches: (Int) -> Boolean): Int {
        val mask = table.size - 1
        var slot = TextHash.mixed(hash).toInt() and mask
        while (true) {
            val id = table[slot] - 1
            if (id < 0 || (hashes[id] == hash && matches(id))) return id
            slot = (slot + 1) and mask
        }
    }

    /** Whether a token's text, from a byte on, begins with these. */
    private fun same(id: Int, from: Int, bytes: ByteArray, start: Int, end: Int): Boolean {
        val at = starts[id] + from
        for (i in start until end) if (text[at + i - start] != bytes[i]) return false
        return true
    }

    private fun insert(id: Int) {
        val mask = table.size - 1
        var slot = TextHash.mixed(hashes[id]).toInt() and mask
        while (table[slot] != 0) slot = (slot + 1) and mask
        table[slot] = id + 1
    }

    private fun growTable() {
        table = IntArray(2 * table.size)
        for (id in lengths.indices) if (lengths[id] != ABSENT) insert(id)
    }

    private fun growIds(id: Int) {
        val size = maxOf(2 * starts.size, id + 1)
        val known = lengths.size
        starts = starts.copyOf(size)
        hashes = hashes.copyOf(size)
        lengths = lengths.copyOf(size).also { it.fill(ABSENT, known) }
    }

    private companion object {
        const val ABSENT = -1
        const val MOST = 1 shl 20
    }
}

/**
 * Which pairs of tokens merge, how early, and into what: an open hash table over primitives. While a file is read only hashes of
 * 64 bits are written down; that two of Gemma's 580,000 pairs have the same has a chance of 1 in 10^8.
 *
 * @param expected about how many merges there will be.
 */
internal class Merges(private val vocabulary: Vocabulary, expected: Int = 1 shl 9) {
    private var keys = LongArray(tableSize(expected * 5L / 3))
    private var ranks = IntArray(keys.size) { EMPTY }
    private var merged = IntArray(keys.size) // id + 1; 0 was not looked up yet
    private var count = 0

    /** Add a merge of two texts, given by their hashes; of the same pair twice the last holds. */
    fun add(left: Long, right: Long, rank: Int) {
        if (5L * ++count > 3L * keys.size) grow()
        insert(key(left, right), rank)
    }

    /** Rank of the merge in the high half and its token in the low one; -1 where the two do not merge. */
    fun find(left: Int, right: Int): Long {
        val slot = slot(key(vocabulary.hash(left), vocabulary.hash(right)))
        if (ranks[slot] == EMPTY) return -1
        // several threads may write here, the same
        if (merged[slot] == 0) merged[slot] = vocabulary.joined(left, right) + 1
        return if (merged[slot] > 0) (ranks[slot].toLong() shl 32) or (merged[slot] - 1).toLong() else -1
    }

    private fun insert(key: Long, rank: Int) {
        val slot = slot(key)
        keys[slot] = key
        ranks[slot] = rank
    }

    /** Where a pair is, or would be. */
    private fun slot(key: Long): Int {
        val mask = keys.size - 1
        var slot = key.toInt() and mask
        while (keys[slot] != key && ranks[slot] != EMPTY) slot = (slot + 1) and mask
        return slot
    }

    private fun grow() {
        val oldKeys = keys
        val oldRanks = ranks
        keys = LongArray(2 * oldKeys.size)
        ranks = IntArray(keys.size) { EMPTY }
        merged = IntArray(keys.size)
        for (i in oldKeys.indices) if (oldRanks[i] != EMPTY) insert(oldKeys[i], oldRanks[i])
    }

    private fun key(left: Long, right: Long): Long = TextHash.mixed(TextHash.mixed(left) + 3 * right)

    private companion object {
        const val EMPTY = -1
    }
}

/** The power of two that holds so many. */
private fun tableSize(entries: Long): Int = maxOf(16L, (entries - 1).takeHighestOneBit() * 2).toInt()
