package com.example.chat

import gemma.edge.SamplingParams
import java.io.File
import kotlinx.coroutines.runBlocking

/** Prints the most likely answer to a question: `Main BUNDLE QUESTION`. */
fun main(arguments: Array<String>) {
    Assistant(File(arguments[0]), SamplingParams(temperature = 0.0)).use { assistant ->
        runBlocking { assistant.ask(arguments[1], ::print) }
    }
}
