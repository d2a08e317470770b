package com.example.chat

import gemma.edge.GemmaException
import gemma.edge.GemmaSession
import gemma.edge.SamplingParams
import java.io.File

class Assistant(private val model: File, private val params: SamplingParams = SamplingParams(temperature = 0.7, topP = 0.95)) : AutoCloseable {
    private var open: GemmaSession? = null

    suspend fun ask(question: String, show: (String) -> Unit) {
        try {
            val session = open ?: GemmaSession.open(model).also { open = it } // seconds, on a thread of its own
            session.send(question, params, maxTokens = 256).collect { piece -> show(piece) }
        } catch (error: GemmaException) {
            show(error.message.orEmpty()) // one line: what was found, what is allowed, the way out
        }
    }

    override fun close() {
        open?.close()
    }
}
