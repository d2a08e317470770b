package com.example.chat

import gemma.edge.Fixtures
import gemma.edge.SamplingParams
import java.io.File
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

/** Tests that the example in docs/android.md does what the page says. */
class AssistantTest {
    private fun ask(model: File, question: String): List<String> {
        val pieces = ArrayList<String>()
        Assistant(model, SamplingParams()).use { assistant -> runBlocking { assistant.ask(question) { pieces += it } } }
        return pieces
    }

    @Test
    fun the_example_shows_the_answer_piece_by_piece() {
        val demo = Fixtures.models.first { it.name == "tiny-gemma2" }
        val first = demo.conversation.first()
        val pieces = ask(demo.bundle, first["text"].string)
        assertTrue(pieces.size > 1)
        assertTrue(pieces.joinToString(""), pieces.joinToString("").startsWith(first["answer"].string))
    }

    @Test
    fun the_example_with_adapters_answers_with_each() {
        val adapted = Fixtures.adapters
        val answers = ArrayList<String>()
        Skills(adapted.first().bundle, adapted.map { it.adapter!! }).use { skills ->
            for (model in adapted) runBlocking {
                val pieces = ArrayList<String>()
                skills.ask(model.adapter!!.name, model.conversation.first()["text"].string) { pieces += it }
                answers += pieces.joinToString("")
                assertTrue(answers.last(), answers.last().startsWith(model.conversation.first()["answer"].string))
            }
        }
        assertEquals(adapted.size, answers.toSet().size)
    }

    @Test
    fun the_example_shows_what_is_wrong_in_one_line() {
        val pieces = ask(File("nowhere"), "Hi")
        assertEquals(1, pieces.size)
        assertTrue(pieces.single(), "nowhere is not a bundle" in pieces.single() && '\n' !in pieces.single())
    }
}
