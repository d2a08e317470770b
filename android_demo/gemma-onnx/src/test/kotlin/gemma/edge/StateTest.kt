package gemma.edge

import gemma.edge.engine.StoredTensor
import gemma.edge.engine.goTo
import gemma.edge.state.StateFile
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

/** Tests saved states in both directions. tools/kotlin_fixtures/check_states.py loads in Python the states that are saved here. */
class StateTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val demo = Fixtures.models.first { it.name == "tiny-gemma2" }
    private val random = Fixtures.models.first { it.name == "random" }

    private fun <T> withRuntime(model: Fixtures.Model, act: (GemmaRuntime) -> T): T =
        GemmaRuntime.open(Bundle.open(model.bundle), threads = 1).use(act)

    private fun <T> withSession(model: Fixtures.Model, act: suspend (GemmaSession, GemmaRuntime) -> T): T {
        val bundle = Bundle.open(model.bundle)
        val runtime = GemmaRuntime.open(bundle, threads = 1)
        return GemmaSession(runtime, Tokenizer.open(bundle), ChatTemplate.of(bundle)).use { runBlocking { act(it, runtime) } }
    }

    private suspend fun GemmaSession.say(text: String) = send(text, maxTokens = 20).toList().joinToString("")

    /** A state of the random model after a few tokens. */
    private fun savedState(): File = File(temporary.root, "state").also { file ->
        withRuntime(random) { runtime ->
            runtime.prefill(intArrayOf(2, 3, 5, 7))
            runtime.save(file)
        }
    }

    @Test
    fun what_python_saved_goes_on_with_pythons_bits() {
        for (model in Fixtures.models) withRuntime(model) { runtime ->
            runtime.prefill(intArrayOf(2, 9, 9)) // these tokens must be forgotten
            assertEquals("{\"kept\": \"with it\"}", runtime.load(model.state))
            assertEquals(model.calls.take(model.stateCalls).sum(), runtime.position)
            assertArrayEquals(model.name, model.logitsAfterState(), runtime.run(model, model.stateCalls until model.calls.size), 0f)
        }
    }

    @Test
    fun what_kotlin_saved_goes_on_with_the_same_bits() {
        for (model in Fixtures.models) withRuntime(model) { runtime ->
            val file = File(model.fromKotlin, "state.safetensors")
            runtime.run(model, 0 until model.stateCalls)
            runtime.save(file, "{\"kept\": \"by Kotlin\"}")
            val rest = model.stateCalls until model.calls.size
            val unbroken = runtime.run(model, rest)
            runtime.reset()
            runtime.load(file)
            assertArrayEquals(model.name, unbroken, runtime.run(model, rest), 0f)
            assertArrayEquals("${model.name}: Python's, which saved there too", model.logitsAfterState(), unbroken, 0f)
        }
    }

    @Test
    fun a_conversation_that_python_saved_goes_on() {
        for (model in Fixtures.models) withSession(model) { session, runtime ->
            session.load(model.savedConversation)
            val (before, last) = model.conversation.takeLast(2)
            assertEquals(before["answer"].string, session.messages.last().content)
            assertEquals(last["answer"].string, session.say(last["text"].string))
            assertEquals("only what is new was fed", last["position"].long, runtime.position.toLong())
        }
    }

    @Test
    fun what_python_put_in_front_of_the_first_turn_stays_pinned() {
        for (model in Fixtures.models) {
            val file = File(temporary.root, "prefixed")
            val last = model.prefixed.last()
            withSession(model) { session, runtime ->
                session.load(model.savedPrefixed)
                assertEquals(model.name, model.prefixed[1]["pinned"].long, runtime.pinned.toLong())
                session.save(file)
            }
            withSession(model) { session, runtime ->
                session.load(file)
                assertEquals(last["answer"].string, session.say(last["text"].string))
                assertEquals(last["pinned"].long, runtime.pinned.toLong())
                assertEquals("only what is new was fed", last["position"].long, runtime.position.toLong())
            }
        }
    }

    @Test
    fun a_conversation_that_kotlin_saved_goes_on() {
        for (model in Fixtures.models) {
            val file = File(model.fromKotlin, "conversation.safetensors")
            val last = model.conversation.last()
            val messages = withSession(model) { session, _ ->
                for (row in model.conversation.dropLast(1)) session.say(row["text"].string)
                session.save(file)
                session.messages
            }
            withSession(model) { session, runtime ->
                session.load(file)
                assertEquals(messages, session.messages)
                assertEquals(last["answer"].string, session.say(last["text"].string))
                assertEquals("only what is new was fed", last["position"].long, runtime.position.toLong())
            }
        }
    }

    @Test
    fun a_state_without_a_cache_is_fed_again_with_pythons_bits() {
        for (model in Fixtures.models) withRuntime(model) { runtime ->
            val file = File(temporary.root, "ids")
            StateFile.open(model.state).use { state ->
                StateFile.write(file, state.header, state.tensors.filter { !it.name.startsWith("cache.") }) { listOf(state.read(it)) }
            }
            runtime.load(file)
            val expected = model.logitsFedAgain()
            val count = expected.size / runtime.bundle.vocabSize
            assertArrayEquals(model.name, expected, runtime.run(model, model.stateCalls until model.stateCalls + count), 0f)
        }
    }

    @Test
    fun the_pinned_tokens_of_a_long_text_are_saved_and_fed_again() {
        val ids = IntArray(500) { random.tokens[it % random.tokens.size] }
        val saved = File(temporary.root, "long")
        val end = withRuntime(random) { runtime ->
            runtime.pin(random.pinned)
            runtime.prefill(ids)
            runtime.save(saved)
            runtime.decode(2).copyOf()
        }

        /** The state without its cache, and with the last ids only, as after thousands of tokens. */
        fun shortened(keep: (StoredTensor) -> Boolean = { true }, change: (ByteBuffer) -> ByteBuffer = { it }) =
            File(temporary.root, "shortened").also { file ->
                StateFile.open(saved).use { state ->
                    val last = ByteBuffer.allocate(Int.SIZE_BYTES * LAST).order(ByteOrder.LITTLE_ENDIAN)
                    ids.takeLast(LAST).forEach(last::putInt)
                    val pinned = state.tensors.filter { it.name == StateFile.FIRST && keep(it) }
                    StateFile.write(file, state.header, pinned + StoredTensor(StateFile.IDS, "I32", listOf(LAST))) { tensor ->
                        listOf(if (tensor.name == StateFile.IDS) last.duplicate().also { it.goTo(0) } else change(state.read(tensor)))
                    }
                }
            }
        withRuntime(random) { runtime ->
            runtime.load(shortened())
            assertEquals(ids.size to random.pinned, runtime.position to runtime.pinned)
            assertArrayEquals(ids.copyOfRange(ids.size - LAST, ids.size), runtime.ids)
            assertTrue(difference(runtime.decode(2), end) < 1e-3) // chunks at other places round differently
            runtime.prefill(ids.copyOf(9))
            runtime.rewind(10)
            assertTrue("after a rewind", difference(runtime.decode(2), end) < 1e-3)
            runtime.load(shortened { it.putInt(8, 77) })
            assertTrue("one of them is another one", difference(runtime.decode(2), end) > 1e-2)
            assertRefuses<StateException>("0 ids of ${random.pinned} pinned tokens") { runtime.load(shortened(keep = { false })) }
        }
    }

    private fun difference(one: FloatArray, other: FloatArray): Float = one.indices.maxOf { abs(one[it] - other[it]) }

    @Test
    fun an_empty_state_is_one_too() = withRuntime(random) { runtime ->
        val file = File(temporary.root, "empty")
        runtime.save(file)
        val first = runtime.prefill(intArrayOf(2, 3)).copyOf()
        runtime.load(file)
        assertEquals(0, runtime.position)
        assertArrayEquals(first, runtime.prefill(intArrayOf(2, 3)), 0f)
    }

    @Test
    fun another_bundles_state_is_refused_and_changes_nothing() = withSession(demo) { session, runtime ->
        session.say("Who are you?")
        val position = runtime.position
        assertRefuses<StateException>("another bundle") { runtime.load(random.state) }
        assertRefuses<StateException>("another bundle") { runBlocking { session.load(random.savedConversation) } }
        assertEquals(position, runtime.position)
        assertEquals(2, session.messages.size)
    }

    @Test
    fun a_file_that_is_no_state_or_damaged_is_refused_and_changes_nothing() {
        val state = savedState()
        withRuntime(random) { runtime ->
            runtime.prefill(intArrayOf(2, 3))
            val wrong = mapOf(
                "is not a file" to null,
                "damaged" to ByteArray(20),
                "a header of" to ByteArray(8) { 0x7f },
                "not a saved state" to "\u0002\u0000\u0000\u0000\u0000\u0000\u0000\u0000{}".toByteArray(),
                "lies outside" to state.readBytes().dropLast(1).toByteArray(),
                "its bytes were changed" to state.readBytes().also { it[it.size - 1]++ },
                "bytes were changed" to changed(state, "\\\"position\\\": 4", "\\\"position\\\": 3"),
                "were changed" to changed(state, "sha256", "sha257"),
                "position 3" to written(state, position = 3),
                "cache.0.kee is not" to written(state) { it.copy(name = it.name.replace("cache.0.key", "cache.0.kee")) },
                "is of I9" to changed(state, "\"F32\"", "\"I9\" "),
            )
            for ((message, bytes) in wrong) {
                val file = File(temporary.root, "wrong")
                if (bytes == null) file.delete() else file.writeBytes(bytes)
                assertRefuses<StateException>(message) { runtime.load(file) }
                assertEquals(2, runtime.position)
            }
        }
    }

    @Test
    fun a_state_that_cannot_be_written_leaves_no_half() = withRuntime(random) { runtime ->
        val folder = File(temporary.root, "folder/in the way").also { it.mkdirs() }
        runtime.prefill(intArrayOf(2, 3))
        assertThrows(IOException::class.java) { runtime.save(folder.parentFile) }
        assertThrows(IOException::class.java) { runtime.save(File(temporary.root, "nowhere/state")) }
        assertEquals(listOf("folder"), temporary.root.list()!!.toList())
    }

    /** The bytes of the state written again with another position or other names of tensors, and with the hash that belongs to them. */
    private fun written(file: File, position: Int = 4, rename: (StoredTensor) -> StoredTensor = { it }): ByteArray {
        val changed = File(temporary.root, "changed")
        StateFile.open(file).use { state ->
            val originals = state.tensors.associateBy(rename)
            val header = state.header.copy(position = position)
            StateFile.write(changed, header, originals.keys.toList()) { listOf(state.read(originals.getValue(it))) }
        }
        return changed.readBytes()
    }

    /** The bytes of the file, with a text in its header replaced by another one of the same length. */
    private fun changed(file: File, old: String, new: String): ByteArray {
        check(old.length == new.length)
        val text = String(file.readBytes(), Charsets.ISO_8859_1)
        check(old in text) { "$old is not in the header" }
        return text.replaceFirst(old, new).toByteArray(Charsets.ISO_8859_1)
    }

    private companion object {
        const val LAST = 60 // tokens: more than the cache can depend on
    }
}
