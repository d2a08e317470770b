package com.example.llm

import java.io.File
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

/** ExecuTorch's own runner on a bundle, greedily; returns the text that follows the prompt. */
fun generate(bundle: File, prompt: String, tokens: Int): String {
    val answer = StringBuilder()
    val callback = LlmCallback { piece -> answer.append(piece) }
    val (program, tokenizer) = listOf("model.pte", "tokenizer.json").map { File(bundle, it).path }
    LlmModule(LlmModule.MODEL_TYPE_TEXT, program, tokenizer, 0f, emptyList(), 1, 0).use { module ->
        module.load()
        // tokens counts the prompt too; then no echo, temperature 0, one <bos> and no <eos>
        module.generate(prompt, tokens, callback, false, 0f, 1, 0)
    }
    return answer.toString()
}
