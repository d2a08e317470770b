package gemma.edge.text

import gemma.edge.JsonException

/**
 * A polynomial hash of bytes, modulo 2^64. The hash of two joined texts can be computed from their hashes, so a pair of tokens is
 * looked up without joining the texts.
 */
internal object TextHash {
    private const val BASE = -0x61c8864680b583ebL // 2^64 / golden ratio; odd
    private val powers = LongArray(1 shl 8).also { it[0] = 1 }.also { for (i in 1 until it.size) it[i] = it[i - 1] * BASE }
    private const val BLANK = ' '.code.toByte()
    const val EMPTY = 0L

    fun of(bytes: ByteArray, start: Int, end: Int): Long {
        var hash = EMPTY
        for (i in start until end) hash = next(hash, bytes[i])
        return hash
    }

    /** The hash of a text followed by one byte. */
    fun next(hash: Long, byte: Byte): Long = hash * BASE + (byte.toInt() and 0xFF) + 1

    /** The hash of a text followed by another one, which has [rightLength] bytes. */
    fun joined(left: Long, right: Long, rightLength: Int): Long = left * power(rightLength) + right

    /**
     * The hash of two texts with a blank between them. The texts of merges have no blanks themselves, because the normalizer has replaced
     * them.
     */
    fun pair(left: Long, right: Long, rightLength: Int): Long = joined(next(left, BLANK), right, rightLength)

    /** The hash with its bits mixed, because tables are indexed with the low bits. */
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
 * The texts of all tokens as UTF-8 in one array, because 256,000 strings would take 20 MB and slow the garbage collector down. First
 * every token is added, then [index] is called once, and then tokens can be found. If two texts had the same hash, only one of them would
 * be found; for Gemma's vocabulary, the probability of that is 2 in 10^9.
 *
 * @param expected roughly how many tokens there will be.
 */
internal class Vocabulary(expected: Int) {
    private var text = ByteArray(8 * expected + 64)
    private var used = 1
    private var starts = IntArray(expected) // by id; 0 means that the id has no token
    private var lengths = IntArray(expected)
    private var hashes = LongArray(expected)
    private lateinit var index: HashIndex

    /** One more than the highest id. */
    var size = 0
        private set

    /** Add a token; [hash] is the [TextHash] of its text. If two tokens have the same text, the one with the higher id is found. */
    fun add(id: Int, bytes: ByteArray, start: Int, end: Int, hash: Long) {
        if (id !in 0 until MAX_TOKENS) throw JsonException("token id $id is not below $MAX_TOKENS")
        if (id >= starts.size) growIds(id)
        if (starts[id] != 0) throw JsonException("token id $id is there twice")
        if (used + end - start > text.size) text = text.copyOf(maxOf(2 * text.size, used + end - start))
        bytes.copyInto(text, used, start, end)
        starts[id] = used
        lengths[id] = end - start
        hashes[id] = hash
        used += end - start
        if (id >= size) size = id + 1
    }

    fun index() {
        index = HashIndex(hashes, size)
    }

    /** The id of the token with this text; -1 if there is none. */
    fun find(bytes: ByteArray, start: Int, end: Int): Int {
        val id = index.find(TextHash.of(bytes, start, end))
        return if (id >= 0 && lengths[id] == end - start && same(id, 0, bytes, start, end)) id else -1
    }

    fun find(word: String): Int = word.toByteArray().let { find(it, 0, it.size) }

    /** The text of a token as UTF-8; null for an id without a token. */
    fun bytes(id: Int): ByteArray? =
        if (id in starts.indices && starts[id] != 0) text.copyOfRange(starts[id], starts[id] + lengths[id]) else null

    /** The id of the token whose text is that of [left] followed by that of [right]; -1 if there is none. */
    fun joined(left: Int, right: Int): Int {
        val middle = lengths[left]
        val id = index.find(TextHash.joined(hashes[left], hashes[right], lengths[right]))
        val matches = id >= 0 && lengths[id] == middle + lengths[right] &&
            same(id, 0, text, starts[left], starts[left] + middle) &&
            same(id, middle, text, starts[right], starts[right] + lengths[right])
        return if (matches) id else -1
    }

    /** The [TextHash.pair] of two tokens. */
    fun pair(left: Int, right: Int): Long = TextHash.pair(hashes[left], hashes[right], lengths[right])

    /** Whether a token's text has, from byte [from] on, the bytes from [start] to [end]. */
    private fun same(id: Int, from: Int, bytes: ByteArray, start: Int, end: Int): Boolean {
        val at = starts[id] + from
        for (i in start until end) if (text[at + i - start] != bytes[i]) return false
        return true
    }

    private fun growIds(id: Int) {
        val size = maxOf(2 * starts.size, id + 1)
        starts = starts.copyOf(size)
        lengths = lengths.copyOf(size)
        hashes = hashes.copyOf(size)
    }

    private companion object {
        const val MAX_TOKENS = 1 shl 20
    }
}

/**
 * Says which pairs of tokens merge, in which order, and into which token. Like in [Vocabulary], everything is added before [index] is
 * called. Of each pair only a hash of 64 bits is kept; the probability that two of Gemma's 580,000 pairs share one is 1 in 10^8.
 *
 * @param expected roughly how many merges there will be.
 */
internal class Merges(private val vocabulary: Vocabulary, expected: Int = 1 shl 9) {
    private var pairs = LongArray(expected)
    private lateinit var index: HashIndex
    var count = 0
        private set

    /** Add the next merge; [pair] is the [TextHash.pair] of its two texts. If a pair is added twice, the later one counts. */
    fun add(pair: Long) {
        if (count == pairs.size) pairs = pairs.copyOf(2 * count + 16)
        pairs[count++] = pair
    }

    fun index() {
        index = HashIndex(pairs, count)
    }

    /** The merge of two tokens: its rank in the high 32 bits, its token in the low ones. -1 if the two do not merge. */
    fun find(left: Int, right: Int): Long {
        val rank = index.find(vocabulary.pair(left, right))
        if (rank < 0) return -1
        val merged = vocabulary.joined(left, right)
        return if (merged >= 0) (rank.toLong() shl 32) or merged.toLong() else -1
    }
}

/**
 * Finds the place of a hash in an array; the last place if the hash is there twice. This is an open hash table that is built at once when
 * all hashes are known. Adding each hash while the file is read takes three times as long, because then the processor cannot fetch the
 * next place in memory ahead of time.
 */
private class HashIndex(private val hashes: LongArray, count: Int) {
    // The table holds place + 1, or 0 where it is empty. Its size is a power of two, so a hash is masked; at least two fifths stay empty.
    private val table = IntArray((5L * count / 3 + 1).takeHighestOneBit().toInt() * 2)

    init {
        // an id without a text has no hash
        for (i in 0 until count) if (hashes[i] != TextHash.EMPTY) table[slot(hashes[i])] = i + 1
    }

    /** The place of a hash; -1 if it is not there. */
    fun find(hash: Long): Int = table[slot(hash)] - 1

    private fun slot(hash: Long): Int {
        val mask = table.size - 1
        var slot = TextHash.mixed(hash).toInt() and mask
        while (table[slot] != 0 && hashes[table[slot] - 1] != hash) slot = (slot + 1) and mask
        return slot
    }
}
