package gemma.edge.engine

import gemma.edge.Bundle
import gemma.edge.ChatTemplate
import gemma.edge.Fixtures
import gemma.edge.GemmaException
import gemma.edge.GemmaRuntime
import gemma.edge.GemmaSession
import gemma.edge.InputException
import gemma.edge.Tokenizer
import gemma.edge.assertRefuses
import gemma.edge.run
import gemma.edge.state.StateFile
import java.io.File
import kotlin.math.abs
import kotlin.random.Random
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

/** What every engine must do, whatever library it runs on: give Python's bits. */
abstract class EngineTest(private val backend: String) {
    @get:Rule
    val temporary = TemporaryFolder()

    protected fun open(folder: File, cacheDir: File? = null): GemmaRuntime =
        GemmaRuntime.open(Bundle.open(folder), backend, threads = 1, cacheDir = cacheDir)

    @Test
    fun logits_are_pythons_bit_for_bit_past_the_end_of_the_context_and_after_a_reset() {
        for (model in Fixtures.models) {
            open(model.bundle).use { runtime ->
                check(model.tokens.size > runtime.backend.cache.context)
                assertArrayEquals(model.name, model.logits(), runtime.run(model), 0f)
                assertEquals(model.tokens.size, runtime.position)
                runtime.reset()
                assertArrayEquals("${model.name} after a reset", model.logits(), runtime.run(model), 0f)
            }
        }
    }

    @Test
    fun tokens_that_were_taken_back_leave_no_trace() {
        for (model in Fixtures.models) open(model.bundle).use { runtime ->
            val rest = model.stateCalls until model.calls.size
            runtime.run(model, 0 until model.stateCalls)
            runtime.decode(3)
            runtime.rewind(1)
            assertArrayEquals(model.name, model.logitsAfter(rest.first), runtime.run(model, rest), 0f)
            assertRefuses<InputException>("rewind -1") { runtime.rewind(-1) }
            assertRefuses<InputException>("rewind 9999999") { runtime.rewind(9_999_999) }
        }
    }

    @Test
    fun after_many_tokens_were_taken_back_the_rest_was_fed_again() {
        for (model in Fixtures.models) open(model.bundle).use { runtime ->
            runtime.pin(model.pinned)
            val half = model.tokens.copyOf(model.tokens.size / 2)
            runtime.prefill(half)
            val expected = runtime.decode(2).copyOf()
            runtime.reset()
            runtime.prefill(model.tokens)
            runtime.rewind(model.tokens.size - half.size)
            assertEquals(half.size, runtime.position)
            assertArrayEquals(half, runtime.ids)
            assertArrayEquals(model.name, expected, runtime.decode(2), 0f)
        }
    }

    @Test
    fun states_are_pythons_and_go_on_with_pythons_bits() {
        for (model in Fixtures.models) open(model.bundle).use { runtime ->
            val rest = model.stateCalls until model.calls.size
            runtime.prefill(intArrayOf(2, 9, 9)) // these tokens must be forgotten
            assertEquals("{\"kept\": \"with it\"}", runtime.load(model.state))
            assertArrayEquals(model.name, model.logitsAfterState(), runtime.run(model, rest), 0f)
            // the same steps as in model_fixtures.py
            runtime.reset()
            runtime.run(model, 0..model.stateCalls)
            runtime.rewind(1)
            val saved = File(temporary.root, "state")
            runtime.save(saved, "{\"kept\": \"with it\"}")
            // check_states.py lets Python go on from it
            runtime.save(File(model.fromKotlin, "state.safetensors"), "{\"kept\": \"by Kotlin\"}")
            StateFile.open(saved).use { ours ->
                StateFile.open(model.state).use { pythons ->
                    assertEquals(pythons.header, ours.header)
                    for (tensor in ours.tensors) assertEquals(tensor.name, pythons.read(tensor), ours.read(tensor))
                    assertEquals(pythons.tensors.toSet(), ours.tensors.toSet() + notSaved(pythons.tensors))
                }
            }
        }
    }

    /** The tensors of a state that Python saves and Kotlin does not. */
    internal open fun notSaved(tensors: List<StoredTensor>): Set<StoredTensor> = emptySet()

    @Test
    fun pinning_makes_a_difference_beyond_the_context_and_its_rules_are_pythons() {
        for (model in Fixtures.models) open(model.bundle).use { runtime ->
            val most = runtime.backend.cache.pinned
            assertRefuses<InputException>("cannot pin -1 tokens: this bundle keeps at most $most") { runtime.pin(-1) }
            assertRefuses<InputException>("cannot pin ${most + 1} tokens", "--pinned") { runtime.pin(most + 1) }
            if (most == 0) return@use
            val context = runtime.backend.cache.context
            val vocabulary = runtime.bundle.vocabSize
            runtime.prefill(model.tokens.copyOf(context))
            runtime.pin(model.pinned)
            assertEquals("all of it is still seen", context, runtime.position)
            runtime.prefill(model.tokens.copyOfRange(context, model.tokens.size))
            runtime.pin(model.pinned)
            assertEquals(model.tokens.size, runtime.position)
            runtime.pin(model.pinned - 1)
            assertEquals("another number begins anew", 0, runtime.position)
            runtime.pin(0)
            model.calls.fold(0) { start, length -> runtime.prefill(model.tokens.copyOfRange(start, start + length)).let { start + length } }
            runtime.rewind(1)
            val unpinned = runtime.decode(model.tokens.last())
            val last = model.logits().let { it.copyOfRange(it.size - vocabulary, it.size) }
            assertTrue(model.name, (0 until vocabulary).maxOf { abs(unpinned[it] - last[it]) } > 1e-2)
        }
    }

    @Test
    fun greedy_text_and_a_conversation_are_pythons() {
        for (model in Fixtures.models) {
            val runtime = open(model.bundle)
            GemmaSession(runtime, Tokenizer.open(runtime.bundle), ChatTemplate.of(runtime.bundle)).use { session ->
                for (row in model.greedy) {
                    val text = runBlocking { session.complete(row["prompt"].string, maxTokens = 60).toList().joinToString("") }
                    assertEquals(model.name, row["text"].string, text)
                }
                runBlocking { session.reset() }
                for (row in model.conversation) {
                    // check_states.py lets Python give the last answer, after what was said before it
                    runBlocking { session.save(File(model.fromKotlin, "conversation.safetensors")) }
                    val answer = runBlocking { session.send(row["text"].string, maxTokens = 20).toList().joinToString("") }
                    assertEquals(model.name, row["answer"].string, answer)
                    assertEquals(model.name, row["position"].long, runtime.position.toLong())
                    assertEquals(model.name, row["pinned"].long, runtime.pinned.toLong())
                }
            }
        }
    }

    @Test
    fun cancelling_ends_an_answer_within_one_token() {
        val model = Fixtures.models.first()
        val runtime = open(model.bundle)
        GemmaSession(runtime, Tokenizer.open(runtime.bundle), template = null).use { session ->
            var fed = 0
            runBlocking {
                launch {
                    session.complete(model.greedy.first()["prompt"].string, maxTokens = 500).collect {
                        fed = runtime.position
                        if (fed > CANCELLED_AT) throw CancellationException("stop")
                    }
                }.join()
            }
            assertTrue("${runtime.position} tokens fed, $fed when it was cancelled", fed > CANCELLED_AT && runtime.position <= fed + 1)
        }
    }

    @Test
    fun what_cannot_be_fed_is_refused_and_changes_nothing() {
        val model = Fixtures.models.first()
        val runtime = open(model.bundle)
        val vocabulary = runtime.bundle.vocabSize
        runtime.decode(2)
        val first = runtime.decode(3).copyOf()
        assertRefuses<InputException>("no token") { runtime.prefill(IntArray(0)) }
        assertRefuses<InputException>("$vocabulary", "vocabulary") { runtime.prefill(intArrayOf(2, vocabulary)) }
        assertRefuses<InputException>("-1") { runtime.decode(-1) }
        assertEquals(2, runtime.position)
        runtime.rewind(1)
        assertArrayEquals(first, runtime.decode(3), 0f)
        runtime.close()
        runtime.close()
        assertRefuses<IllegalStateException>("closed") { runtime.decode(2) }
        assertRefuses<IllegalStateException>("closed") { runtime.rewind(0) }
    }

    @Test
    fun opening_again_and_again_takes_no_more_memory() {
        val model = Fixtures.models.first()
        val resident = List(OPENINGS) {
            open(model.bundle).use { it.prefill(intArrayOf(2, 3, 4)) }
            System.gc()
            residentKib()
        }
        // what is not freed is not freed any time, so the smallest of many tells it from what comes and goes
        val (early, late) = resident.drop(1).chunked(OPENINGS / 2) { it.min() }
        val grown = (late - early) / (OPENINGS / 2)
        assertTrue("resident KiB $resident", grown < LEAK_KIB)
    }

    private fun residentKib(): Int =
        File("/proc/self/status").readLines().first { it.startsWith("VmRSS") }.split(Regex("\\s+"))[1].toInt()

    /** Change single bytes of the program's graph; each copy must be refused, or run, but not end the process. */
    internal fun damageEverywhere(model: Fixtures.Model, bytes: Int) {
        val random = Random(0)
        var refused = 0
        val folder = damaged(model) { it }
        val program = File(folder, Bundle.open(folder).backend(backend).program)
        val intact = program.readBytes()
        repeat(DAMAGES) {
            program.delete() // not written over: it may still be mapped
            program.writeBytes(intact.copyOf().also { it[random.nextInt(bytes)] = random.nextInt().toByte() })
            try {
                open(folder).use { it.prefill(intArrayOf(2, 3)) }
            } catch (_: GemmaException) {
                refused++
            }
        }
        println("$backend: $DAMAGES damaged programs, $refused refused")
    }

    /** A copy of a bundle with the bytes of the backend's program changed. */
    internal fun damaged(model: Fixtures.Model, change: (ByteArray) -> ByteArray): File {
        val folder = temporary.newFolder()
        model.bundle.copyRecursively(folder, overwrite = true)
        val program = File(folder, Bundle.open(folder).backend(backend).program)
        program.writeBytes(change(program.readBytes()))
        return folder
    }

    private companion object {
        const val OPENINGS = 20
        const val CANCELLED_AT = 12 // tokens; the answer would have hundreds
        const val DAMAGES = 100
        const val LEAK_KIB = 100 // of one opening; the program alone has 410
    }
}
