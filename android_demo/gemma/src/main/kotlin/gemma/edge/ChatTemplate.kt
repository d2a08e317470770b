package gemma.edge

import gemma.edge.engine.sha256
import java.io.IOException

/**
 * One message of a conversation.
 *
 * @property role its author: `user` or `assistant`, or `system` for the first message where the template takes one.
 * @property content its text.
 */
public data class Message(public val role: String, public val content: String)

/**
 * Writes a conversation as text with special tokens. If a bundle has a chat template that this library does not know, give the session
 * a `ChatTemplate` of your own.
 */
public fun interface ChatTemplate {
    /**
     * The prompt to which the model's next answer is the continuation.
     *
     * @param messages the conversation, oldest message first.
     * @throws InputException the template cannot express this conversation.
     */
    public fun render(messages: List<Message>): String

    public companion object {
        /** Gemma 2's format: user and assistant take turns, the user first; there is no system role. */
        public val GEMMA2: ChatTemplate = ChatTemplate(::renderGemma2)

        /** Gemma 3's format: Gemma 2's, and what a system message says is the beginning of the user's first turn. */
        public val GEMMA3: ChatTemplate = ChatTemplate(::renderGemma3)

        // Known templates by their hashes. A template is a program, and this library has no interpreter for it.
        private val KNOWN = mapOf(
            "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6" to GEMMA2, // google/gemma-2-2b-it, -9b-it, -27b-it
            "cd6c106411f99be366e6fb668a90454316370b3ceab71ccb6a684b710f908241" to GEMMA2, // demo/tiny-gemma2
            "ef70863d4ec4624704d4ca7290673981e52301865f710334ea26e0fd333d5516" to GEMMA2, // tools/benchmarks/synthetic_tokenizer.py
            "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4" to GEMMA3, // google/gemma-3-1b-it, -4b-it, -12b-it, -27b-it
            "22174db62c6a2bbb6fbca28f7fc21b481cfe28f2069db687d1099d47d2813da1" to GEMMA3, // tools/benchmarks/synthetic_tokenizer.py
        )

        /**
         * The template of a bundle; Gemma 2's if the checkpoint had none. The Python runtime chooses in the same way.
         *
         * @throws BundleException tokenizer_config.json is damaged.
         * @throws UnsupportedException the checkpoint has another template, which this library cannot run.
         */
        public fun of(bundle: Bundle): ChatTemplate {
            val source = source(bundle) ?: return GEMMA2
            val hash = sha256 { update(source.toByteArray()) }
            return KNOWN[hash] ?: throw UnsupportedException(
                "${bundle.folder}: its chat template is not one of Gemma's (sha256 ${hash.take(16)}...); " +
                    "pass a ChatTemplate to the session, for example ChatTemplate.GEMMA2 if the format is the same",
            )
        }

        private fun source(bundle: Bundle): String? {
            if (bundle.has(TEMPLATE_FILE)) return bundle.file(TEMPLATE_FILE).readText()
            if (!bundle.has(CONFIG_FILE)) return null
            val path = bundle.file(CONFIG_FILE)
            return try {
                templateIn(JsonReader.parse(path.readBytes()))
            } catch (error: JsonException) {
                throw BundleException("$path is damaged (${error.message}); import the bundle again", error)
            } catch (error: IOException) {
                throw BundleException("$path cannot be read (${error.message}); import the bundle again", error)
            }
        }

        /** The template in the tokenizer's configuration: a string, or a list of named templates with one named `default`. */
        private fun templateIn(config: Any?): String? {
            val root = Node(config, CONFIG_FILE)
            if ("chat_template" !in root) return null
            val template = root["chat_template"]
            return when (template.value) {
                null -> null
                is List<*> -> template.list.firstOrNull { it["name"].value == "default" }?.get("template")?.string
                    ?: throw JsonException("none of the chat templates is named default")
                else -> template.string
            }
        }

        private fun renderGemma2(messages: List<Message>): String = renderTurns(messages, "")

        private fun renderGemma3(messages: List<Message>): String {
            val system = messages.firstOrNull()?.takeIf { it.role == "system" } ?: return renderTurns(messages, "")
            return renderTurns(messages.drop(1), system.content + "\n\n")
        }

        /** Turns of user and model; `first` stands before the words of the first one. */
        private fun renderTurns(messages: List<Message>, first: String): String = buildString {
            append("<bos>")
            messages.forEachIndexed { index, message ->
                val expected = if (index % 2 == 0) "user" else "assistant"
                if (message.role != expected) {
                    throw InputException("message $index is the ${message.role}'s; user and assistant must take turns, the user first")
                }
                append("<start_of_turn>").append(if (index % 2 == 0) "user" else "model").append('\n')
                if (index == 0) append(first)
                append(message.content.trimmed()).append("<end_of_turn>\n")
            }
            append("<start_of_turn>model\n")
        }

        private const val TEMPLATE_FILE = "chat_template.jinja"
        private const val CONFIG_FILE = "tokenizer_config.json"
    }
}

// NEXT_LINE: a blank for Python, and therefore for a template's `trim`, but not for Java.
private const val NEXT_LINE = '\u0085'

/** The text as a template's `trim` returns it. */
internal fun String.trimmed(): String = trim { it.isWhitespace() || it == NEXT_LINE }
