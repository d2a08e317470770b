package gemma.edge

/** A token that is found in a text before anything else. */
internal class AddedToken(val id: Int, val content: ByteArray, val special: Boolean, val normalized: Boolean)

/**
 * A Gemma tokenizer.json: a BPE over characters with bytes as a fallback. Whatever else the format can express is refused by name,
 * never ignored. Source: huggingface/tokenizers, tokenizer/serialization.rs and models/bpe/serialization.rs.
 */
internal class TokenizerFile private constructor(bytes: ByteArray) {
    val vocabulary = Vocabulary(expected = bytes.size / 68 + 16) // as in Gemma's own
    var merges = Merges(vocabulary)
        private set
    val added = ArrayList<AddedToken>()

    /** What replaces a blank, and becomes one again. */
    var blank: ByteArray = ByteArray(0)
        private set
    private var model: Map<String, Any?> = emptyMap()
    private var decoder: Any? = null
    private var preTokenizer: Any? = null

    init {
        val reader = JsonReader(bytes)
        reader.readObject { key ->
            when (key) {
                "model" -> readModel(reader)
                "added_tokens" -> Node(reader.readValue(), key).list.forEach(::addToken)
                "normalizer" -> blank = blankOf(reader.readValue())
                "decoder" -> decoder = reader.readValue()
                "pre_tokenizer" -> preTokenizer = reader.readValue()
                else -> reader.readValue() // post_processor: the caller puts BOS; truncation and padding: not for generation
            }
        }
        reader.expectEnd()
        vocabulary.index()
        merges.index()
        check()
    }

    private fun readModel(reader: JsonReader) {
        val settings = LinkedHashMap<String, Any?>()
        reader.readObject { key ->
            when (key) {
                "vocab" -> readVocabulary(reader)
                "merges" -> readMerges(reader)
                else -> settings[key] = reader.readValue()
            }
        }
        model = settings
    }

    private fun readVocabulary(reader: JsonReader) = reader.readRawObject {
        reader.expect(':')
        vocabulary.add(reader.readInt(), reader.text, reader.start, reader.end, reader.hash)
    }

    /**
     * Both ways of writing a merge: `["a", "b"]`, and `"a b"` as older files have it. Their tokens are looked up when they meet in a text.
     */
    private fun readMerges(reader: JsonReader) {
        merges = Merges(vocabulary, expected = vocabulary.size * 9 / 4) // as in Gemma's own
        reader.readArray {
            if (reader.taken('[')) {
                reader.scanString()
                val left = reader.hash
                reader.expect(',')
                reader.scanString()
                merges.add(TextHash.pair(left, reader.hash, reader.end - reader.start))
                reader.expect(']')
            } else {
                reader.scanString()
                if (!hasBlank(reader)) throw JsonException("merge ${merges.count} has no blank in it")
                merges.add(reader.hash)
            }
        }
    }

    private fun hasBlank(reader: JsonReader): Boolean {
        for (i in reader.start until reader.end) if (reader.text[i] == SPACE) return true
        return false
    }

    private fun addToken(node: Node) {
        for (flag in listOf("single_word", "lstrip", "rstrip")) {
            if (node[flag].value != false) unsupported("an added token with $flag")
        }
        val content = node["content"].string.toByteArray()
        if (content.isEmpty()) throw JsonException("an added token is empty")
        added += AddedToken(node["id"].int(0..MOST_TOKENS), content, node["special"].value == true, node["normalized"].value == true)
    }

    private fun blankOf(normalizer: Any?): ByteArray {
        val node = normalizer as? Map<*, *>
        val content = node?.get("content") as? String
        if (node?.get("type") != "Replace" || node["pattern"] != SPACE_PATTERN || content == null || ' ' in content) {
            unsupported("the normalizer $normalizer")
        }
        return content.toByteArray()
    }

    private fun check() {
        for ((key, allowed) in MODEL) {
            if (model[key] !in allowed) unsupported("a model with $key ${model[key]}")
        }
        if (blank.isEmpty()) unsupported("no normalizer")
        val word = String(blank)
        if (decoder != mapOf("type" to "Sequence", "decoders" to decoders(word))) unsupported("the decoder $decoder")
        // it splits at blanks, of which the normalizer has left none
        val pattern = (preTokenizer as? Map<*, *>)?.get("pattern")
        if (preTokenizer != null && pattern != SPACE_PATTERN) unsupported("the pre_tokenizer $preTokenizer")
    }

    companion object {
        private const val SPACE = ' '.code.toByte()
        private const val MOST_TOKENS = 1 shl 20
        private val SPACE_PATTERN = mapOf("String" to " ")
        private val MODEL = mapOf(
            "type" to setOf("BPE", null),
            "byte_fallback" to setOf(true),
            "dropout" to setOf(null),
            "continuing_subword_prefix" to setOf(null, ""),
            "end_of_word_suffix" to setOf(null, ""),
            "ignore_merges" to setOf(null, false),
        )

        private fun decoders(word: String) = listOf(
            mapOf("type" to "Replace", "pattern" to mapOf("String" to word), "content" to " "),
            mapOf("type" to "ByteFallback"),
            mapOf("type" to "Fuse"),
        )

        private fun unsupported(what: String): Nothing =
            throw UnsupportedException("tokenizer.json has $what, which this library does not know; Gemma's own tokenizer has none of it")

        /**
         * Read a tokenizer.json.
         *
         * @throws JsonException it is none.
         * @throws UnsupportedException it is not of Gemma's kind.
         */
        fun parse(bytes: ByteArray): TokenizerFile = TokenizerFile(bytes)
    }
}
