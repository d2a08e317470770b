package gemma.edge

import org.junit.Assert.assertEquals
import org.junit.Assert.assertThrows
import org.junit.Test

class JsonReaderTest {
    private fun parse(text: String) = JsonReader.parse(text.toByteArray())

    @Test
    fun reads_every_kind_of_value() {
        val expected = mapOf("a" to listOf(1L, -2.5, 1e3, true, false, null), "ü" to mapOf("" to "x"), "e" to emptyList<Any>())
        assertEquals(expected, parse(""" { "a" : [1, -2.5, 1e3, true,false,null], "ü":{"":"x"} ,"e":[ ] } """))
    }

    @Test
    fun reads_escapes_and_surrogate_pairs() {
        assertEquals("a\"\\/\b\u000C\n\r\té🙂z", parse("\"a\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\ud83d\\ude42z\""))
    }

    @Test
    fun refuses_what_is_no_json() {
        val broken = listOf("", "{", "[1,]", "{\"a\"}", "\"", "\"\\x\"", "\"\\u12\"", "\"\\ud83d\"", "tru", "1 2", "[1", "-", "{\"a\":1,}")
        for (text in broken) assertThrows(text, JsonException::class.java) { parse(text) }
    }

    @Test
    fun refuses_nesting_that_would_exhaust_the_stack() {
        assertThrows(JsonException::class.java) { parse("[".repeat(100_000)) }
    }
}
