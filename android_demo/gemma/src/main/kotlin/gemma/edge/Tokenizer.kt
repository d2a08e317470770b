package gemma.edge

import gemma.edge.text.AddedToken
import gemma.edge.text.IntList
import gemma.edge.text.TokenizerFile
import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CharacterCodingException
import java.util.PriorityQueue

/**
 * Encodes text as token ids and decodes it again, as a bundle's tokenizer.json says. The ids are those of Hugging Face tokenizers.
 * Several threads may use one tokenizer.
 *
 * @property bosTokenId the first token of every text.
 * @property stopIds the tokens that end an answer: those of the model, and the end of a turn.
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

    public val stopIds: Set<Int> = eosTokenIds + listOf(END_OF_TURN, START_OF_RESPONSE).mapNotNull(::idOf)

    /** The id of the token with this text; null if there is none. */
    public fun idOf(token: String): Int? = added.values.firstOrNull { String(it.content) == token }?.id
        ?: vocabulary.find(token).takeIf { it >= 0 }

    /**
     * The token ids of a text. A special token in the text, for example `<start_of_turn>`, becomes its id.
     *
     * @param bos put the BOS id first, unless the text begins with it.
     * @throws InputException the text has half a surrogate pair, so it is not valid Unicode.
     */
    public fun encode(text: String, bos: Boolean = true): IntArray {
        val bytes = utf8(text)
        val ids = IntList()
        raw.split(bytes, ids) { piece -> normalized.split(replaceBlanks(piece), ids) { word -> merge(word, ids) } }
        return if (bos && ids.firstOrMinus1() != bosTokenId) intArrayOf(bosTokenId) + ids.toArray() else ids.toArray()
    }

    /** The text of token ids. Special tokens are left out, and bytes that are not valid UTF-8 become U+FFFD. */
    public fun decode(ids: IntArray): String {
        val text = StringBuilder()
        val bytes = ByteRun()
        for (id in ids) {
            val byte = byteOf(id)
            if (byte != null) bytes.add(byte) else text.append(bytes.textBefore(textOf(id)))
        }
        return text.append(bytes.take()).toString()
    }

    /** A decoder for tokens that are generated one after the other. */
    public fun stream(): TextStream = TextStream(this)

    /** The byte of a byte token (0 to 255); null for any other token. */
    internal fun byteOf(id: Int): Int? = byteOf[id]

    /** The text of a token that is not a byte token; empty for a special token and for an id without a token. */
    internal fun textOf(id: Int): String {
        val token = added[id]
        if (token?.special == true) return ""
        return String(token?.content ?: vocabulary.bytes(id) ?: return "").replace(String(blank), " ")
    }

    /** The token of a byte; -1 if none is needed. Gemma's vocabulary has a tab, for example, and no byte token for it. */
    private fun byteId(byte: Int): Int {
        val id = vocabulary.find("<0x${HEX[byte shr 4]}${HEX[byte and 0xF]}>") // format() would take 10 ms for all 256
        if (id < 0 && (byte >= 0x80 || vocabulary.find(byte.toChar().toString()) < 0)) {
            throw UnsupportedException("tokenizer.json has no token for the byte 0x%02X; Gemma's tokenizer has one for every byte".format(byte))
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

    /** Append the byte pair encoding of one word to [out]. Source: huggingface/tokenizers, models/bpe/word.rs, `merge_all`. */
    private fun merge(word: ByteArray, out: IntList) {
        val symbols = symbols(word)
        val count = symbols.size
        val previous = IntArray(count) { it - 1 }
        val next = IntArray(count) { if (it + 1 < count) it + 1 else -1 }
        val queue = PriorityQueue<Candidate>()
        fun offer(left: Int, right: Int) {
            val merge = merges.find(symbols[left], symbols[right])
            if (merge >= 0) queue.add(Candidate((merge ushr 32).toInt(), left, merge.toInt()))
        }
        for (i in 0 until count - 1) offer(i, i + 1)
        while (true) {
            val candidate = queue.poll() ?: break
            val left = candidate.position
            val right = next[left]
            // an earlier merge may have changed the pair
            if (symbols[left] == GONE || right < 0) continue
            val merge = merges.find(symbols[left], symbols[right])
            if (merge < 0 || merge.toInt() != candidate.merged) continue
            symbols[left] = candidate.merged
            symbols[right] = GONE
            next[left] = next[right]
            if (next[left] >= 0) previous[next[left]] = left
            if (previous[left] >= 0) offer(previous[left], left)
            if (next[left] >= 0) offer(left, next[left])
        }
        for (symbol in symbols) if (symbol != GONE) out.add(symbol)
    }

    /** One token per character, or the tokens of its bytes if the character is not in the vocabulary. */
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
        private const val START_OF_RESPONSE = "<start_function_response>" // FunctionGemma ends its calls with it
        private const val SPACE = ' '.code.toByte()
        private const val GONE = -1
        private const val HEX = "0123456789ABCDEF"
        private const val BLOCK = 1 shl 16

        // MAX_BYTES: the largest tokenizer.json that is read.
        private const val MAX_BYTES = 1 shl 28

        /**
         * Open the tokenizer of a bundle.
         *
         * @throws BundleException tokenizer.json is damaged.
         * @throws UnsupportedException the bundle has no tokenizer, or not one of Gemma's kind.
         */
        public fun open(bundle: Bundle): Tokenizer {
            if (!bundle.has(FILE)) {
                throw UnsupportedException("${bundle.folder} has no $FILE; feed token ids instead of text")
            }
            return open(bundle.file(FILE), bundle.bosTokenId, bundle.eosTokenIds)
        }

        /** Open the tokenizer in a file; the errors are the same. */
        internal fun open(file: File, bosTokenId: Int, eosTokenIds: Set<Int>): Tokenizer = try {
            Tokenizer(TokenizerFile.parse(read(file)), bosTokenId, eosTokenIds)
        } catch (error: JsonException) {
            throw BundleException("$file is not a tokenizer (${error.message}); import the bundle again", error)
        } catch (error: IOException) {
            throw BundleException("$file cannot be read (${error.message}); import the bundle again", error)
        }

        /**
         * Read a file in half the time of `readBytes`. That function reads one block of the file's size, for which Java allocates a second
         * one outside the heap.
         */
        private fun read(file: File): ByteArray {
            val size = file.length()
            if (size > MAX_BYTES) throw IOException("it has $size bytes; at most $MAX_BYTES are allowed")
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
            val buffer = Charsets.UTF_8.newEncoder().encode(CharBuffer.wrap(text)) // throws, while String.toByteArray writes a '?'
            ByteArray(buffer.remaining()).also { buffer.get(it) }
        } catch (error: CharacterCodingException) {
            throw InputException("the text has half a surrogate pair; pass valid Unicode text")
        }
    }
}

/**
 * Decodes tokens one after the other. The text of a character that takes several byte tokens is returned with the last of them. Only one
 * thread may use a stream.
 */
public class TextStream internal constructor(private val tokenizer: Tokenizer) {
    private val bytes = ByteRun()

    /** Add a token and return the text that it completes; empty if it completes none. */
    public fun push(id: Int): String {
        val byte = tokenizer.byteOf(id) ?: return bytes.textBefore(tokenizer.textOf(id))
        bytes.add(byte)
        return if (bytes.isText()) bytes.take() else ""
    }
}

/**
 * Successive byte tokens. They become text if together they are valid UTF-8; otherwise each becomes U+FFFD, as in Hugging Face's
 * ByteFallback.
 */
private class ByteRun {
    private val bytes = ByteArrayOutputStream()

    fun add(byte: Int) = bytes.write(byte)

    fun isText(): Boolean = decoded() != null

    /** Return the text of the run and empty it. */
    fun take(): String = (decoded() ?: "\uFFFD".repeat(bytes.size())).also { bytes.reset() }

    /** End the run with [text], the next token's, and return both. A special token has no text and does not end the run. */
    fun textBefore(text: String): String = if (text.isEmpty()) "" else take() + text

    private fun decoded(): String? = try {
        Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes.toByteArray())).toString()
    } catch (_: CharacterCodingException) {
        null
    }
}

/** Finds added tokens in a text from left to right. If several match, the longest is taken. */
private class AddedTokens(tokens: List<AddedToken>) {
    private val byFirst = tokens.groupBy { it.content[0] }.mapValues { (_, same) -> same.sortedByDescending { it.content.size } }

    /** Append the ids of the added tokens in [text] to [ids], and call [between] for every piece between them, in order. */
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
