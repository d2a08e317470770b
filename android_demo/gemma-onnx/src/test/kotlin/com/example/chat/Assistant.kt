package com.example.chat

import gemma.edge.GemmaException
import gemma.edge.GemmaSession
import gemma.edge.SamplingParams
import java.io.File

class Assistant(
    private val model: File,
    private val params: SamplingParams = SamplingParams(temperature = 0.7, topP = 0.95),
) : AutoCloseable {
    private var open: GemmaSession? = null

    suspend fun ask(question: String, show: (String) -> Unit) {
        try {
            // opening takes seconds, on a thread of its own
            val session = open ?: GemmaSession.open(model).also { open = it }
            session.send(question, params, maxTokens = 256).collect { piece -> show(piece) }
        } catch (error: GemmaException) {
            // one line: what is wrong, what is allowed, and what to do
            show(error.message.orEmpty())
        }
    }

    override fun close() {
        open?.close()
    }
}
