package gemma.edge.text

import gemma.edge.JsonException
import gemma.edge.JsonReader
import gemma.edge.Node
import gemma.edge.UnsupportedException

/** A token that is looked for in a text before the text is split in any other way. */
internal class AddedToken(val id: Int, val content: ByteArray, val special: Boolean, val normalized: Boolean)

/**
 * The contents of a tokenizer.json of Gemma's kind: byte pair encoding of characters, with byte tokens for characters that are not in
 * the vocabulary. Everything else that the format can express is refused by name; nothing is ignored. Source: huggingface/tokenizers,
 * tokenizer/serialization.rs and models/bpe/serialization.rs.
 */
internal class TokenizerFile private constructor(bytes: ByteArray) {
    val vocabulary = Vocabulary(expected = bytes.size / 68 + 16) // Gemma's file has 68 bytes per token
    var merges = Merges(vocabulary)
        private set
    val added = ArrayList<AddedToken>()

    /** The text that replaces a blank before encoding, and becomes a blank again after decoding. */
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
                // post_processor adds BOS, which the caller does; truncation and padding are not used for generation
                else -> reader.readValue()
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
     * Read the merges, each written as `["a", "b"]`, or as `"a b"` in older files. Their tokens are looked up only when a text has the
     * pair.
     */
    private fun readMerges(reader: JsonReader) {
        merges = Merges(vocabulary, expected = vocabulary.size * 9 / 4) // the ratio in Gemma's file
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
        added += AddedToken(node["id"].int(0..MAX_ID), content, node["special"].value == true, node["normalized"].value == true)
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
        // a pre-tokenizer that splits at blanks has no effect, because the normalizer has replaced all of them
        val pattern = (preTokenizer as? Map<*, *>)?.get("pattern")
        if (preTokenizer != null && pattern != SPACE_PATTERN) unsupported("the pre_tokenizer $preTokenizer")
    }

    companion object {
        private const val SPACE = ' '.code.toByte()
        private const val MAX_ID = 1 shl 20
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
            throw UnsupportedException("tokenizer.json has $what, which this library does not know; Gemma's tokenizer does not have it")

        /**
         * Read a tokenizer.json.
         *
         * @throws JsonException the bytes are not a tokenizer.json.
         * @throws UnsupportedException the tokenizer is not of Gemma's kind.
         */
        fun parse(bytes: ByteArray): TokenizerFile = TokenizerFile(bytes)
    }
}
