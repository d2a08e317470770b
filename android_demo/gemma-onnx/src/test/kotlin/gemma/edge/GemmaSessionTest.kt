package gemma.edge

import java.util.concurrent.atomic.AtomicInteger
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertEquals
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Test

class GemmaSessionTest {
    private val demo = Fixtures.models.first { it.name == "tiny-gemma2" }

    /** A runtime that counts the tokens it is fed, and that can fail. */
    private class Watched(private val runtime: GemmaRuntime) : GemmaRuntime by runtime {
        val decoded = AtomicInteger()
        val prefilled = AtomicInteger()
        var failAfter = Int.MAX_VALUE

        override fun prefill(ids: IntArray): FloatArray {
            prefilled.addAndGet(ids.size)
            return runtime.prefill(ids)
        }

        override fun decode(token: Int): FloatArray {
            check(decoded.incrementAndGet() <= failAfter) { "the model failed" }
            return runtime.decode(token)
        }
    }

    private fun withSession(act: suspend CoroutineScope.(GemmaSession, Watched) -> Unit) = runBlocking {
        val bundle = Bundle.open(demo.bundle)
        val runtime = Watched(GemmaRuntime.open(bundle, threads = 1))
        GemmaSession(runtime, Tokenizer.open(bundle), ChatTemplate.of(bundle)).use { session -> act(session, runtime) }
    }

    private suspend fun GemmaSession.say(text: String, maxTokens: Int = 20) = send(text, maxTokens = maxTokens).toList().joinToString("")

    @Test
    fun greedy_text_is_pythons() {
        for (model in Fixtures.models) {
            runBlocking {
                GemmaSession.open(model.bundle, threads = 1).use { session ->
                    for (row in model.greedy) {
                        val text = session.complete(row["prompt"].string, maxTokens = 60).toList().joinToString("")
                        assertEquals(model.name, row["text"].string, text)
                    }
                }
            }
        }
    }

    @Test
    fun a_conversation_is_pythons_turn_by_turn_and_feeds_only_what_is_new() {
        for (model in Fixtures.models) {
            val bundle = Bundle.open(model.bundle)
            val runtime = GemmaRuntime.open(bundle, threads = 1)
            GemmaSession(runtime, Tokenizer.open(bundle), ChatTemplate.of(bundle)).use { session ->
                for (row in model.conversation) {
                    assertEquals(model.name, row["answer"].string, runBlocking { session.say(row["text"].string) })
                    assertEquals(model.name, row["position"].long, runtime.position.toLong())
                }
                assertEquals(2 * model.conversation.size, session.messages.size)
            }
        }
    }

    @Test
    fun a_conversation_with_a_prefix_is_pythons_and_keeps_it_in_sight() {
        for (model in Fixtures.models) {
            val bundle = Bundle.open(model.bundle)
            val runtime = GemmaRuntime.open(bundle, threads = 1)
            GemmaSession(runtime, Tokenizer.open(bundle), ChatTemplate.of(bundle), prefix = "Be kind. ").use { session ->
                repeat(2) {
                    for (row in model.prefixed) {
                        assertEquals(model.name, row["answer"].string, runBlocking { session.say(row["text"].string) })
                        assertEquals(model.name, row["pinned"].long, runtime.pinned.toLong())
                    }
                    assertTrue(session.messages.first().content.startsWith("Be kind. "))
                    runBlocking { session.reset() }
                }
            }
        }
    }

    @Test
    fun what_the_system_says_stays_pinned_beyond_the_context_unless_it_is_too_long_or_not_wanted() = runBlocking {
        val bundle = Bundle.open(Fixtures.models.first { it.name == "random" }.bundle)
        val tokenizer = Tokenizer.open(bundle)
        GemmaRuntime.open(bundle, threads = 1).use { runtime ->
            suspend fun pinned(system: String?, pinSystem: Boolean = true): Int {
                val session = GemmaSession(runtime, tokenizer, ChatTemplate.GEMMA3, pinSystem = pinSystem)
                session.restore(listOfNotNull(system?.let { Message("system", it) }))
                session.say("Who are you?")
                session.say("Tell me more.")
                check(session.position > runtime.backend.cache.context)
                return runtime.pinned
            }
            val start = "<bos><start_of_turn>user\n"
            assertEquals(tokenizer.encode(start).size, pinned(null))
            assertEquals(tokenizer.encode("${start}Be kind.\n\n").size, pinned("Be kind."))
            assertEquals(0, pinned("Be kind.", pinSystem = false))
            assertEquals("longer than what the bundle keeps", 0, pinned("Be brief, and be kind to everybody."))
        }
    }

    @Test
    fun a_stop_text_ends_the_answer_and_the_chat_goes_on() = withSession { session, _ ->
        val whole = session.say("Who was Moses?", maxTokens = 30)
        val stop = whole.substring(9, 12)
        session.reset()
        val cut = session.send("Who was Moses?", maxTokens = 30, stop = listOf(stop)).toList().joinToString("")
        assertEquals(whole.substringBefore(stop), cut)
        assertEquals(cut, session.messages.last().content)
        val next = session.say("And then?")
        val messages = session.messages.dropLast(2)
        session.restore(messages)
        assertEquals("the tokens of the stop text are not the conversation's", next, session.say("And then?"))
        assertThrows(InputException::class.java) { runBlocking { session.send("a", stop = listOf("")).toList() } }
    }

    @Test
    fun nothing_is_computed_before_somebody_collects() = withSession { session, runtime ->
        val answer = session.send("Hi")
        delay(50)
        assertEquals(0, runtime.prefilled.get())
        answer.first()
        assertTrue(runtime.prefilled.get() > 0)
    }

    @Test
    fun the_model_waits_for_a_slow_collector() = withSession { session, runtime ->
        var said = 0
        session.complete("Call me", maxTokens = 12).collect { piece ->
            said += piece.toByteArray().size
            delay(20)
            val fed = runtime.decoded.get()
            // each token adds at least one byte; the next character, of up to four byte tokens, is waiting for the collector
            assertTrue("$fed tokens fed, $said bytes taken", fed <= said + 4)
        }
        assertEquals(11, runtime.decoded.get())
    }

    @Test
    fun cancelling_ends_an_answer_within_one_token_and_what_was_said_stands() = withSession { session, runtime ->
        val said = StringBuilder()
        var fed = 0
        val job = launch {
            session.send("Who are you?", maxTokens = 500).collect {
                said.append(it)
                if (said.length > 30) {
                    fed = runtime.decoded.get()
                    throw CancellationException("stop")
                }
            }
        }
        job.join()
        assertTrue("${runtime.decoded.get()} tokens fed, $fed when it was cancelled", runtime.decoded.get() <= fed + 1)
        assertEquals(said.toString(), session.messages.last().content)
    }

    @Test
    fun after_a_cancelled_answer_the_cache_holds_exactly_the_conversation() = withSession { session, runtime ->
        val cut = session.send("Who are you?", maxTokens = 100).take(5).toList().joinToString("")
        val fedBefore = runtime.prefilled.get()
        val second = session.say("And then?")
        val freshlyFed = runtime.prefilled.get() - fedBefore
        assertTrue("only the new turn is fed, not $freshlyFed tokens", freshlyFed < 30)
        val messages = session.messages
        assertEquals(cut, messages[1].content)
        // the same conversation, fed at once into an empty cache
        session.restore(messages.take(2))
        assertEquals(second, session.say("And then?"))
    }

    @Test
    fun a_job_that_is_cancelled_from_outside_ends() = withSession { session, runtime ->
        val job = launch { session.complete("And the LORD said unto", maxTokens = 100_000).collect {} }
        while (runtime.decoded.get() < 3) delay(1)
        job.cancelAndJoin()
        val fed = runtime.decoded.get()
        delay(30)
        assertEquals(fed, runtime.decoded.get())
        assertTrue(session.complete("Call me", maxTokens = 5).toList().isNotEmpty())
    }

    @Test
    fun a_failing_model_does_not_leave_a_wrong_cache() = withSession { session, runtime ->
        val first = session.say("Who are you?")
        runtime.failAfter = runtime.decoded.get() + 3
        assertThrows(IllegalStateException::class.java) { runBlocking { session.say("And then?") } }
        assertEquals("the turn did not happen", 2, session.messages.size)
        runtime.failAfter = Int.MAX_VALUE
        val second = session.say("And then?")
        session.restore(session.messages.take(2))
        assertEquals(first, session.messages[1].content)
        assertEquals(second, session.say("And then?"))
    }

    @Test
    fun a_new_conversation_knows_nothing_of_the_old_one() = withSession { session, _ ->
        val first = session.say("Who are you?")
        session.say("And then?")
        session.reset()
        assertEquals(emptyList<Message>(), session.messages)
        assertEquals(first, session.say("Who are you?"))
    }

    @Test
    fun numbers_of_an_answer_add_up() = withSession { session, runtime ->
        session.complete("Call me Ishmael.", maxTokens = 7).toList()
        val stats = session.stats!!
        assertEquals(runtime.prefilled.get(), stats.promptTokens)
        assertEquals(7, stats.newTokens)
        assertEquals("the last token is not fed", 6, runtime.decoded.get())
        assertTrue(stats.ttftMs > 0 && stats.decodeTokensPerS > 0 && stats.prefillTokensPerS > 0)
    }

    @Test
    fun a_turn_that_cannot_be_is_refused_and_nothing_is_fed() = withSession { session, runtime ->
        assertRefuses<InputException>("maxTokens 0") { runBlocking { session.say("Hi", maxTokens = 0) } }
        assertRefuses<InputException>("surrogate") { runBlocking { session.say("\ud83d") } }
        assertEquals(0, runtime.prefilled.get())
        assertEquals(emptyList<Message>(), session.messages)
    }
}
