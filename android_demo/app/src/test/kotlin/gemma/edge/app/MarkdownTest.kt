package gemma.edge.app

import gemma.edge.app.views.markdown
import org.junit.Assert.assertEquals
import org.junit.Test

class MarkdownTest {
    private fun read(text: String): Pair<String, List<String>> = markdown(text).let { styled ->
        styled.text to styled.parts.map { "${it.style} ${styled.text.substring(it.start, it.end)}" }
    }

    @Test
    fun signs_become_styles() {
        assertEquals("a bold and it and code" to listOf("BOLD bold", "ITALIC it", "CODE code"), read("a **bold** and *it* and `code`"))
        assertEquals("very much" to listOf("ITALIC much", "BOLD very much"), read("**very *much***").let { it.first to it.second })
        assertEquals("Title\ntext" to listOf("HEADING Title"), read("## Title ##\ntext"))
        assertEquals("one\ntwo bold" to listOf("BULLET one", "BOLD bold", "BULLET two bold"), read("- one\n* two **bold**"))
    }

    @Test
    fun code_is_taken_as_it_is() {
        assertEquals("a ** b" to listOf("CODE a ** b"), read("`a ** b`"))
        assertEquals("before\nx = *p\n# no\nafter" to listOf("CODE_BLOCK x = *p\n# no\n"), read("before\n```c\nx = *p\n# no\n```\nafter"))
    }

    @Test
    fun a_text_that_is_still_being_written_shows_its_signs() {
        for (text in listOf("**bol", "a * b * c", "2*3", "`x", "**", "*", "#no", "", "\n", "snake_case_name")) {
            assertEquals(text to emptyList<String>(), read(text))
        }
        assertEquals("x" to listOf("CODE_BLOCK x"), read("```\nx"))
    }

    @Test
    fun every_beginning_of_a_text_can_be_shown() {
        val text = "# T\n\n- **a *b***\n```\ncode\n```\n`c` **d"
        for (end in 0..text.length) markdown(text.take(end)).let { styled -> styled.parts.forEach { styled.text.substring(it.start, it.end) } }
    }
}
