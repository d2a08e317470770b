package gemma.edge

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CharacterCodingException
import java.util.PriorityQueue

/**
 * Text to token ids and back, from a bundle's tokenizer.json; the same ids as Hugging Face tokenizers. Safe for several threads.
 *
 * @property bosTokenId first token of every text.
 * @property stopIds tokens that end an answer: the model's own, and the end of a turn.
 */
public class Tokenizer private constructor(file: TokenizerFile, public val bosTokenId: Int, eosTokenIds: Set<Int>) {
    private val vocabulary = file.vocabulary
    private val merges = file.merges
    private val blank = file.blank
    private val added = file.added.associateBy { it.id }
    private val raw = AddedTokens(file.added.filter { !it.normalized })
    private val normalized = AddedTokens(file.added.filter { it.normalized }.map { it.withContent(replaceBlanks(it.content)) })
    private val byteIds = IntArray(256, ::byteId)
    private val byteOf = (0..0xFF).filter { byteIds[it] >= 0 }.associateBy { byteIds[it] }

    public val stopIds: Set<Int> = eosTokenIds + listOfNotNull(idOf(END_OF_TURN))

    /** The id of a token by its text, or null. */
    public fun idOf(token: String): Int? = added.values.firstOrNull { String(it.content) == token }?.id
        ?: vocabulary.find(token).takeIf { it >= 0 }

    /**
     * Token ids of a text; special tokens written in it, such as `<start_of_turn>`, become their ids.
     *
     * @param bos begin with the BOS id, unless the text itself begins with it.
     * @throws InputException the text holds half a surrogate pair, so it is no Unicode text.
     */
    public fun encode(text: String, bos: Boolean = true): IntArray {
        val bytes = utf8(text)
        val ids = IntList()
        raw.split(bytes, ids) { piece -> normalized.split(replaceBlanks(piece), ids) { word -> merge(word, ids) } }
        return if (bos && ids.firstOrMinus1() != bosTokenId) intArrayOf(bosTokenId) + ids.toArray() else ids.toArray()
    }

    /** Text of token ids, without special tokens; bytes that are no UTF-8 become U+FFFD. */
    public fun decode(ids: IntArray): String {
        val text = StringBuilder()
        val bytes = ByteRun()
        for (id in ids) {
            val byte = byteOf(id)
            if (byte != null) bytes.add(byte) else text.append(bytes.textBefore(textOf(id)))
        }
        return text.append(bytes.take()).toString()
    }

    /** A decoder of tokens as they come. */
    public fun stream(): TextStream = TextStream(this)

    /** What a token adds to a text: a byte (0 to 255), or null where it is no byte token. */
    internal fun byteOf(id: Int): Int? = byteOf[id]

    /** The text of a token that is no byte; empty for a special token, and for an id that is none. */
    internal fun textOf(id: Int): String {
        val token = added[id]
        if (token?.special == true) return ""
        return String(token?.content ?: vocabulary.bytes(id) ?: return "").replace(String(blank), " ")
    }

    /** The token of a byte; -1 where none is needed: Gemma's own vocabulary has a tab, and therefore no token for its byte. */
    private fun byteId(byte: Int): Int {
        val id = vocabulary.find("<0x${HEX[byte shr 4]}${HEX[byte and 0xF]}>") // format() takes 10 ms for all of them
        if (id < 0 && (byte >= 0x80 || vocabulary.find(byte.toChar().toString()) < 0)) {
            throw UnsupportedException("tokenizer.json has no token for the byte 0x%02X; Gemma's own has one for every byte".format(byte))
        }
        return id
    }

    private fun replaceBlanks(bytes: ByteArray): ByteArray {
        val blanks = bytes.count { it == SPACE }
        if (blanks == 0) return bytes
        val replaced = ByteArray(bytes.size + blanks * (blank.size - 1))
        var at = 0
        for (byte in bytes) {
            if (byte == SPACE) {
                blank.copyInto(replaced, at)
                at += blank.size
            } else {
                replaced[at++] = byte
            }
        }
        return replaced
    }

    /** Byte pair encoding of one piece. Source: huggingface/tokenizers, models/bpe/word.rs, `merge_all`. */
    private fun merge(word: ByteArray, out: IntList) {
        val symbols = symbols(word)
        val count = symbols.size
        val previous = IntArray(count) { it - 1 }
        val next = IntArray(count) { if (it + 1 < count) it + 1 else -1 }
        val queue = PriorityQueue<Candidate>()
        fun offer(left: Int, right: Int) {
            val found = merges.find(symbols[left], symbols[right])
            if (found >= 0) queue.add(Candidate((found ushr 32).toInt(), left, found.toInt()))
        }
        for (i in 0 until count - 1) offer(i, i + 1)
        while (true) {
            val candidate = queue.poll() ?: break
            val left = candidate.position
            val right = next[left]
            // the pair may be another one by now
            if (symbols[left] == GONE || right < 0) continue
            val found = merges.find(symbols[left], symbols[right])
            if (found < 0 || found.toInt() != candidate.merged) continue
            symbols[left] = candidate.merged
            symbols[right] = GONE
            next[left] = next[right]
            if (next[left] >= 0) previous[next[left]] = left
            if (previous[left] >= 0) offer(previous[left], left)
            if (next[left] >= 0) offer(left, next[left])
        }
        for (symbol in symbols) if (symbol != GONE) out.add(symbol)
    }

    /** A token for each character; several byte tokens for one that the vocabulary does not hold. */
    private fun symbols(word: ByteArray): IntArray {
        val ids = IntList()
        var start = 0
        while (start < word.size) {
            var end = start + 1
            while (end < word.size && word[end].toInt() and 0xC0 == 0x80) end++ // continuation bytes
            val id = vocabulary.find(word, start, end)
            if (id >= 0) ids.add(id) else for (i in start until end) ids.add(byteIds[word[i].toInt() and 0xFF])
            start = end
        }
        return ids.toArray()
    }

    private class Candidate(val rank: Int, val position: Int, val merged: Int) : Comparable<Candidate> {
        override fun compareTo(other: Candidate): Int =
            if (rank != other.rank) rank.compareTo(other.rank) else position.compareTo(other.position)
    }

    public companion object {
        internal const val FILE = "tokenizer.json"
        private const val END_OF_TURN = "<end_of_turn>"
        private const val SPACE = ' '.code.toByte()
        private const val GONE = -1
        private const val HEX = "0123456789ABCDEF"
        private const val BLOCK = 1 shl 16
        private const val MOST_BYTES = 1 shl 28

        /**
         * The tokenizer of a bundle.
         *
         * @throws BundleException the file is damaged.
         * @throws UnsupportedException the bundle has none, or one that is not of Gemma's kind.
         */
        public fun open(bundle: Bundle): Tokenizer {
            if (!bundle.has(FILE)) {
                throw UnsupportedException("${bundle.folder} is a token-level bundle, without $FILE; give token ids instead of text")
            }
            return open(bundle.file(FILE), bundle.bosTokenId, bundle.eosTokenIds)
        }

        /** The tokenizer in a file; errors as above. */
        internal fun open(file: File, bosTokenId: Int, eosTokenIds: Set<Int>): Tokenizer = try {
            Tokenizer(TokenizerFile.parse(read(file)), bosTokenId, eosTokenIds)
        } catch (error: JsonException) {
            throw BundleException("$file is not a tokenizer (${error.message}); import the bundle again", error)
        } catch (error: IOException) {
            throw BundleException("$file cannot be read (${error.message}); import the bundle again", error)
        }

        /** All of a file in half the time of `readBytes`, which asks for it in one block: Java makes as large a one outside the heap. */
        private fun read(file: File): ByteArray {
            val size = file.length()
            if (size > MOST_BYTES) throw IOException("it has $size bytes, at most $MOST_BYTES are read")
            val bytes = ByteArray(size.toInt())
            file.inputStream().use { input ->
                var at = 0
                while (at < bytes.size) {
                    val read = input.read(bytes, at, minOf(BLOCK, bytes.size - at))
                    if (read < 0) throw IOException("it ends after $at of ${bytes.size} bytes")
                    at += read
                }
            }
            return bytes
        }

        private fun utf8(text: String): ByteArray = try {
            val buffer = Charsets.UTF_8.newEncoder().encode(CharBuffer.wrap(text)) // reports, where String replaces by '?'
            ByteArray(buffer.remaining()).also { buffer.get(it) }
        } catch (error: CharacterCodingException) {
            throw InputException("the text holds half a surrogate pair; give valid Unicode text")
        }
    }
}

/**
 * Text of tokens as they come, piece by piece. A character spelled in several byte tokens comes whole. Not for several threads.
 */
public class TextStream internal constructor(private val tokenizer: Tokenizer) {
    private val bytes = ByteRun()

    /** The text that a token completes; empty where it completes none. */
    public fun push(id: Int): String {
        val byte = tokenizer.byteOf(id) ?: return bytes.textBefore(tokenizer.textOf(id))
        bytes.add(byte)
        return if (bytes.isText()) bytes.take() else ""
    }
}

/** Byte tokens in a row: text if all of them together are UTF-8, else U+FFFD for each, as Hugging Face's ByteFallback has it. */
private class ByteRun {
    private val bytes = ByteArrayOutputStream()

    fun add(byte: Int) = bytes.write(byte)

    fun isText(): Boolean = decoded() != null

    /** The text of the run, which is then empty. */
    fun take(): String = (decoded() ?: "\uFFFD".repeat(bytes.size())).also { bytes.reset() }

    /** The run ends before [text]; a special token, which has none, does not end it. */
    fun textBefore(text: String): String = if (text.isEmpty()) "" else take() + text

    private fun decoded(): String? = try {
        Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes.toByteArray())).toString()
    } catch (_: CharacterCodingException) {
        null
    }
}

/** Finds added tokens in a text: from left to right, the longest one first. */
private class AddedTokens(tokens: List<AddedToken>) {
    private val byFirst = tokens.groupBy { it.content[0] }.mapValues { (_, same) -> same.sortedByDescending { it.content.size } }

    /** Append the ids of the tokens in [text] to [ids], and give every piece between them to [between]. */
    inline fun split(text: ByteArray, ids: IntList, between: (ByteArray) -> Unit) {
        var start = 0
        var at = 0
        while (at < text.size) {
            val token = byFirst[text[at]]?.firstOrNull { startsWith(text, at, it.content) }
            if (token == null) {
                at++
                continue
            }
            if (at > start) between(text.copyOfRange(start, at))
            ids.add(token.id)
            at += token.content.size
            start = at
        }
        if (start < text.size) between(if (start == 0) text else text.copyOfRange(start, text.size))
    }

    private fun startsWith(text: ByteArray, at: Int, content: ByteArray): Boolean {
        if (at + content.size > text.size) return false
        for (i in content.indices) if (text[at + i] != content[i]) return false
        return true
    }
}

private fun AddedToken.withContent(content: ByteArray) = AddedToken(id, content, special, normalized)
