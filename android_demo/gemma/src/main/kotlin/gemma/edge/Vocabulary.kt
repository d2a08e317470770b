package gemma.edge

/**
 * The texts of all tokens as UTF-8 in one array, found by an open hash table: 256,000 strings would take 20 MB and a garbage
 * collector's time.
 */
internal class Vocabulary {
    private var text = ByteArray(1 shl 12)
    private var used = 0
    private var starts = IntArray(1 shl 9)
    private var lengths = IntArray(1 shl 9) { ABSENT }
    private var table = LongArray(1 shl 10) // hash in the high half, id + 1 in the low one; 0 is empty
    private var count = 0
    private var join = ByteArray(64)

    /** Add a token; of two with the same text the first is found. */
    fun add(id: Int, bytes: ByteArray, start: Int, end: Int) {
        if (id !in 0 until MOST) throw JsonException("token id $id is not below $MOST")
        if (id >= starts.size) growIds(id)
        if (lengths[id] != ABSENT) throw JsonException("token id $id is there twice")
        if (used + end - start > text.size) text = text.copyOf(maxOf(2 * text.size, used + end - start))
        bytes.copyInto(text, used, start, end)
        starts[id] = used
        lengths[id] = end - start
        used += end - start
        if (2 * ++count > table.size) growTable()
        val hash = hashOf(bytes, start, end)
        insert((hash.toLong() shl 32) or (id + 1L))
    }

    /** The id of a text, or -1. */
    fun find(bytes: ByteArray, start: Int, end: Int): Int {
        val hash = hashOf(bytes, start, end)
        val mask = table.size - 1
        var slot = hash and mask
        while (true) {
            val entry = table[slot]
            if (entry == 0L) return -1
            if ((entry ushr 32).toInt() == hash) {
                val id = entry.toInt() - 1
                if (lengths[id] == end - start && same(starts[id], bytes, start, end)) return id
            }
            slot = (slot + 1) and mask
        }
    }

    fun find(word: String): Int = word.toByteArray().let { find(it, 0, it.size) }

    /** The text of a token as UTF-8; null for an id without one. */
    fun bytes(id: Int): ByteArray? =
        if (id in lengths.indices && lengths[id] != ABSENT) text.copyOfRange(starts[id], starts[id] + lengths[id]) else null

    /** The id of the text of [left] followed by that of [right], or -1. */
    fun joined(left: Int, right: Int): Int {
        val length = lengths[left] + lengths[right]
        if (join.size < length) join = ByteArray(2 * length)
        text.copyInto(join, 0, starts[left], starts[left] + lengths[left])
        text.copyInto(join, lengths[left], starts[right], starts[right] + lengths[right])
        return find(join, 0, length)
    }

    private fun same(at: Int, bytes: ByteArray, start: Int, end: Int): Boolean {
        for (i in start until end) if (text[at + i - start] != bytes[i]) return false
        return true
    }

    private fun insert(entry: Long) {
        val mask = table.size - 1
        var slot = (entry ushr 32).toInt() and mask
        while (table[slot] != 0L) slot = (slot + 1) and mask
        table[slot] = entry
    }

    private fun growTable() {
        val old = table
        table = LongArray(2 * old.size)
        for (entry in old) if (entry != 0L) insert(entry)
    }

    private fun growIds(id: Int) {
        val size = maxOf(2 * starts.size, id + 1)
        val known = lengths.size
        starts = starts.copyOf(size)
        lengths = lengths.copyOf(size).also { it.fill(ABSENT, known) }
    }

    private fun hashOf(bytes: ByteArray, start: Int, end: Int): Int {
        var hash = end - start
        for (i in start until end) hash = hash * 31 + bytes[i]
        hash *= -0x61c88647 // 2^32 / golden ratio: spread over the high bits, and those back over the low ones
        return hash xor (hash ushr 15)
    }

    private companion object {
        const val ABSENT = -1
        const val MOST = 1 shl 20
    }
}

/** Which pairs of tokens merge, how early, and into what: an open hash table over primitives. */
internal class Merges {
    private var pairs = LongArray(1 shl 10) { EMPTY }
    private var results = LongArray(1 shl 10) // rank in the high half, merged id in the low one
    private var count = 0

    /** Add a merge; of the same pair twice the last holds. */
    fun add(left: Int, right: Int, rank: Int, merged: Int) {
        if (5L * ++count > 3L * pairs.size) grow()
        insert(pair(left, right), (rank.toLong() shl 32) or merged.toLong())
    }

    /** Rank of the merge in the high half and its token in the low one; -1 where the two do not merge. */
    fun find(left: Int, right: Int): Long {
        val slot = slot(pair(left, right))
        return if (pairs[slot] == EMPTY) -1 else results[slot]
    }

    private fun insert(pair: Long, result: Long) {
        val slot = slot(pair)
        pairs[slot] = pair
        results[slot] = result
    }

    /** Where a pair is, or would be. */
    private fun slot(pair: Long): Int {
        val mask = pairs.size - 1
        val mixed = pair * -0x61c8864680b583ebL // 2^64 / golden ratio
        var slot = (mixed ushr 32).toInt() and mask
        while (pairs[slot] != pair && pairs[slot] != EMPTY) slot = (slot + 1) and mask
        return slot
    }

    private fun grow() {
        val oldPairs = pairs
        val oldResults = results
        pairs = LongArray(2 * oldPairs.size) { EMPTY }
        results = LongArray(2 * oldPairs.size)
        for (i in oldPairs.indices) if (oldPairs[i] != EMPTY) insert(oldPairs[i], oldResults[i])
    }

    private fun pair(left: Int, right: Int): Long = (left.toLong() shl 32) or right.toLong()

    private companion object {
        const val EMPTY = -1L
    }
}
