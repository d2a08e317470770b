package gemma.edge

import gemma.edge.text.Merges
import gemma.edge.text.TextHash
import gemma.edge.text.Vocabulary
import java.io.File
import java.io.RandomAccessFile
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class TokenizerTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val demo = Fixtures.tokenizers.first { it.name == "demo" }

    private fun open(folder: File) = Tokenizer.open(File(folder, Tokenizer.FILE), bosTokenId = 2, eosTokenIds = setOf(1))

    private fun rows(folder: File) = Fixtures.json(File(folder, "texts.json")).list

    @Test
    fun ids_are_those_of_hugging_face_tokenizers() {
        for (folder in Fixtures.tokenizers) {
            val tokenizer = open(folder)
            for (row in rows(folder).filter { it["text"].value != null }) {
                val text = row["text"].string
                assertArrayEquals("${folder.name}: '$text'", Fixtures.ints(row["ids"]), tokenizer.encode(text, bos = false))
            }
        }
    }

    @Test
    fun texts_are_those_of_hugging_face_tokenizers() {
        for (folder in Fixtures.tokenizers) {
            val tokenizer = open(folder)
            for (row in rows(folder)) {
                assertEquals("${folder.name}: ${row["ids"].value}", row["decoded"].string, tokenizer.decode(Fixtures.ints(row["ids"])))
            }
        }
    }

    @Test
    fun pieces_of_a_stream_joined_are_the_text() {
        for (folder in Fixtures.tokenizers) {
            val tokenizer = open(folder)
            for (row in rows(folder).filter { it["text"].value != null }) {
                val stream = tokenizer.stream()
                assertEquals(row["decoded"].string, Fixtures.ints(row["ids"]).joinToString("") { stream.push(it) })
            }
        }
    }

    @Test
    fun a_character_of_several_byte_tokens_comes_whole() {
        val tokenizer = open(demo)
        val stream = tokenizer.stream()
        assertEquals(listOf("", "", "", "🐋"), tokenizer.encode("🐋", bos = false).map { stream.push(it) })
    }

    @Test
    fun bos_comes_first_and_only_once() {
        val tokenizer = open(demo)
        val without = tokenizer.encode("whale", bos = false)
        assertArrayEquals(intArrayOf(2) + without, tokenizer.encode("whale"))
        assertArrayEquals(intArrayOf(2) + without, tokenizer.encode("<bos>whale"))
        assertArrayEquals(intArrayOf(2), tokenizer.encode(""))
    }

    @Test
    fun the_end_of_a_turn_is_a_stop_token() {
        val tokenizer = open(demo)
        assertEquals(setOf(1, tokenizer.idOf("<end_of_turn>")), tokenizer.stopIds)
        assertEquals(null, tokenizer.idOf("no such token"))
    }

    @Test
    fun half_a_surrogate_pair_is_refused() {
        assertRefuses<InputException>("surrogate") { open(demo).encode("a\ud83d") }
    }

    @Test
    fun settings_that_gemma_does_not_have_are_refused_by_name() {
        val original = File(demo, Tokenizer.FILE).readText()
        val changes = listOf(
            listOf("\"byte_fallback\":true", "\"byte_fallback\":false", "byte_fallback false"),
            listOf("\"ignore_merges\":false", "\"ignore_merges\":true", "ignore_merges true"),
            listOf("\"lstrip\":false", "\"lstrip\":true", "lstrip"),
            listOf("\"type\":\"BPE\"", "\"type\":\"Unigram\"", "type Unigram"),
            listOf("\"type\":\"Fuse\"", "\"type\":\"Strip\"", "decoder"),
            listOf("\"type\":\"Replace\"", "\"type\":\"Lowercase\"", "normalizer"),
            listOf("\"content\":\"▁\"", "\"content\":\"a b\"", "normalizer"),
        )
        val path = temporary.newFile(Tokenizer.FILE)
        for ((old, new, named) in changes) {
            val changed = original.replace(Regex(Regex.escape(old).replace(":", "\\E:\\s*\\Q")), new)
            check(changed != original) { "$old is not in the demo's tokenizer" }
            path.writeText(changed)
            assertRefuses<UnsupportedException>(named) { open(temporary.root) }
        }
    }

    @Test
    fun merges_written_in_either_way_give_the_same_ids() {
        val original = File(demo, Tokenizer.FILE).readText()
        val pair = Regex("""\[\s*"((?:[^"\\]|\\.)*)",\s*"((?:[^"\\]|\\.)*)"\s*]""")
        val start = original.indexOf("\"merges\"")
        check(pair.find(original, start) != null) { "the demo's merges are not written as pairs" }
        File(temporary.root, Tokenizer.FILE).writeText(
            original.take(start) + pair.replace(original.drop(start)) { "\"${it.groupValues[1]} ${it.groupValues[2]}\"" },
        )
        val tokenizer = open(temporary.root)
        for (row in rows(demo).filter { it["text"].value != null }) {
            assertArrayEquals(row["text"].string, Fixtures.ints(row["ids"]), tokenizer.encode(row["text"].string, bos = false))
        }
    }

    @Test
    fun a_merge_of_one_text_is_refused() {
        val path = temporary.newFile(Tokenizer.FILE)
        path.writeText("""{"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", "ab"]}}""")
        assertRefuses<BundleException>("merge 1 has no blank") { open(temporary.root) }
    }

    @Test
    fun an_id_of_two_texts_is_refused() {
        val path = temporary.newFile(Tokenizer.FILE)
        path.writeText("""{"model": {"vocab": {"a": 0, "b": 0}}}""")
        assertRefuses<BundleException>("token id 0 is there twice") { open(temporary.root) }
    }

    @Test
    fun of_what_is_there_twice_the_last_is_found() {
        val vocabulary = Vocabulary(expected = 4)
        for ((id, word) in listOf("a", "b", "ab", "a").withIndex()) {
            val text = word.toByteArray()
            vocabulary.add(id, text, 0, text.size, TextHash.of(text, 0, text.size))
        }
        vocabulary.index()
        assertEquals(3, vocabulary.find("a"))
        val merges = Merges(vocabulary)
        for ((left, right) in listOf(0 to 1, 1 to 0, 0 to 1)) merges.add(vocabulary.pair(left, right))
        merges.index()
        assertEquals((2L shl 32) or 2L, merges.find(0, 1))
    }

    @Test
    fun an_id_between_others_may_have_no_text() {
        val vocabulary = Vocabulary(expected = 1)
        val text = "ab".toByteArray()
        for ((id, end) in listOf(2 to 1, 7 to 2)) vocabulary.add(id, text, 0, end, TextHash.of(text, 0, end))
        vocabulary.index()
        assertEquals(listOf(2, 7, -1, -1), listOf("a", "ab", "b", "").map { vocabulary.find(it) })
        assertEquals(listOf(null, "a", null, "ab", null), listOf(0, 2, 5, 7, 8).map { id -> vocabulary.bytes(id)?.let(::String) })
    }

    @Test
    fun a_file_that_no_tokenizer_has_is_not_read() {
        RandomAccessFile(temporary.newFile(Tokenizer.FILE), "rw").use { it.setLength(1L shl 32) }
        assertRefuses<BundleException>("4294967296 bytes", "268435456") { open(temporary.root) }
    }

    @Test
    fun a_damaged_file_is_named() {
        val path = temporary.newFile(Tokenizer.FILE)
        for (text in listOf("", "{}", "[]", File(demo, Tokenizer.FILE).readText().dropLast(500))) {
            path.writeText(text)
            try {
                open(temporary.root)
                error("accepted: ${text.take(20)}")
            } catch (error: GemmaException) {
                check(Tokenizer.FILE in error.message!!) { error.message!! }
            }
        }
    }
}
