package com.example.llm

import gemma.edge.Fixtures
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

/** Tests that the example in docs/export/executorch.md gives the text of Python's runtime. */
class LlmNativeTest {
    @Test
    fun the_example_continues_the_prompt_as_python_does() {
        val model = Fixtures.models.single()
        for (row in model.greedy.take(2)) {
            val text = generate(model.bundle, row["prompt"].string, tokens = 40)
            assertTrue("too short: $text", text.length > 20)
            assertEquals(text, row["text"].string.take(text.length))
        }
    }
}
