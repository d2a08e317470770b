package com.example.chat

import gemma.edge.Adapter
import gemma.edge.Bundle
import gemma.edge.ChatTemplate
import gemma.edge.GemmaRuntime
import gemma.edge.GemmaSession
import gemma.edge.Tokenizer
import java.io.File

/** One model in memory, and a conversation with each of its adapters. */
class Skills(model: File, adapters: List<File>) : AutoCloseable {
    private val bundle = Bundle.open(model)
    private val runtime = GemmaRuntime.open(bundle, backend = "onnx")
    private val sessions = adapters.associate { folder ->
        val tokenizer = Tokenizer.open(bundle)
        folder.name to GemmaSession(runtime, tokenizer, ChatTemplate.of(bundle), adapter = Adapter.open(folder))
    }

    suspend fun ask(skill: String, question: String, show: (String) -> Unit) {
        sessions.getValue(skill).send(question).collect { piece -> show(piece) }
    }

    override fun close() {
        runtime.close()
    }
}
