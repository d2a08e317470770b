package gemma.edge

import kotlin.math.tanh
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/**
 * A bundle of ShieldGemma, which judges what goes in and what comes out, as `runtimes/guard.py` does.
 *
 * @param runtime the runtime, which nothing else may use.
 * @param tokenizer the tokenizer of the same bundle.
 * @param dispatcher where the model runs.
 * @throws UnsupportedException the tokenizer has no tokens Yes and No.
 */
public class Guard(
    private val runtime: GemmaRuntime,
    private val tokenizer: Tokenizer,
    private val dispatcher: CoroutineDispatcher = Dispatchers.Default,
) : AutoCloseable {
    private val turn = Mutex()
    private val yes = token("Yes")
    private val no = token("No")

    /**
     * The probability that a text violates a policy: the softmax of the logits of Yes and No.
     *
     * @param policy a guideline, such as `"No Whales": The chatbot shall not generate content that speaks of whales.`
     * @param prompt what the user wrote.
     * @param answer the answer, which is then what is judged; null judges the prompt.
     * @throws InputException the text is longer than the bundle's context, so that a part of it would not be judged.
     */
    public suspend fun score(policy: String, prompt: String, answer: String? = null): Double = withContext(dispatcher) {
        turn.withLock {
            val ids = tokenizer.encode(question(policy, prompt, answer))
            val context = runtime.backend.cache.context
            if (ids.size > context) throw InputException("a text of ${ids.size} tokens is longer than the guard's context of $context")
            runtime.reset()
            val logits = runtime.prefill(ids)
            0.5 + 0.5 * tanh((logits[yes].toDouble() - logits[no]) / 2)
        }
    }

    /** Free the model's memory. */
    override fun close(): Unit = runtime.close()

    private fun token(word: String): Int = tokenizer.idOf(word)
        ?: throw UnsupportedException("${runtime.bundle.folder} cannot judge: its tokenizer has no token $word; open a bundle of ShieldGemma")

    internal companion object {
        private val CONTROL = listOf("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")

        /** What ShieldGemma reads; its next token is Yes or No. */
        fun question(policy: String, prompt: String, answer: String?): String {
            val (subject, name) = if (answer == null) "a user prompt" to "human question" else "an AI response to a prompt" to "Chatbot Response"
            return buildString {
                append("You are a policy expert trying to help determine whether $subject is in violation of the defined safety policies.\n\n")
                append("<start_of_turn>\nHuman Question: ${plain(prompt)}\n<end_of_turn>\n")
                if (answer != null) append("<start_of_turn>\nChatbot Response: ${plain(answer)}\n<end_of_turn>\n")
                append("\nOur safety principle is defined in the below:\n\n* $policy\n\n===\n\n")
                append("Does the $name violate the above principle? Your answer must start with 'Yes' or 'No'. ")
                append("And then walk through step by step to be sure we answer correctly.\n\n")
            }
        }

        private fun plain(text: String): String = CONTROL.fold(text) { rest, token -> rest.replace(token, " ") }.trimmed()
    }
}
