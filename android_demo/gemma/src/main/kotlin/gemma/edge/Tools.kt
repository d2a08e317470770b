package gemma.edge

import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/**
 * A function that the model may call.
 *
 * @property name 1 to 64 letters, digits, `_` and `-`.
 * @property description what it does and when to call it, for the model.
 * @property parameters a JSON schema of its arguments.
 */
public data class Tool(
    public val name: String,
    public val description: String = "",
    public val parameters: String = """{"type":"object","properties":{}}""",
)

/** A part of an answer of a model that has tools. */
public sealed interface Said {
    /** A piece of text. */
    public data class Text(public val text: String) : Said

    /**
     * A call. Nothing holds the model to the schema here: check the arguments before you use them.
     *
     * @property arguments a JSON object.
     */
    public data class Call(public val name: String, public val arguments: String) : Said
}

/**
 * Tools for a Gemma that has no tokens for them, in the form of `runtimes/tools/json_calls.py`. Give [offer] to the session as `prefix`,
 * read the answer by [said], and send the results of its calls by [results].
 */
public object Tools {
    private const val OFFER = "You have access to functions. If you decide to invoke any of the function(s), you MUST put it in the format of\n" +
        "[{\"name\": function name, \"parameters\": dictionary of argument name and its value}]\n\n" +
        "You SHOULD NOT include any other text in the response if you call a function\n"
    private val NAME = Regex("[A-Za-z0-9_-]{1,64}")
    private val OPENINGS = listOf("[", "```json", "```tool_code")
    private val FENCE = Regex("^```(?:json|tool_code)\\s*|\\s*```$")

    /**
     * The text in front of the user's first message: the `prefix` of a session.
     *
     * @throws InputException a name that cannot be written, two tools of one name, or parameters that are not a JSON object.
     */
    public fun offer(tools: List<Tool>): String {
        tools.groupBy { it.name }.values.firstOrNull { it.size > 1 }?.let { throw InputException("two tools are called ${it[0].name}") }
        return OFFER + tools.joinToString(",", "[", "]\n\n") { tool ->
            if (!NAME.matches(tool.name)) throw InputException("a tool cannot be called ${tool.name}; use letters, digits, _ and -")
            if (parsed(tool.parameters) !is Map<*, *>) throw InputException("the parameters of tool ${tool.name} are not a JSON object")
            "{\"name\":${toJson(tool.name)},\"description\":${toJson(tool.description)},\"parameters\":${tool.parameters.trim()}}"
        }
    }

    /** The message with the results of the calls of an answer, in their order. */
    public fun results(results: List<String>): String = results.joinToString("\n") { "```tool_output\n$it\n```" }

    /**
     * The text and the calls of an answer of [GemmaSession.send]. Text comes as it is written. Calls come when the answer is complete; what
     * looks like calls but is none of [tools] is text.
     */
    public fun said(answer: Flow<String>, tools: List<Tool>): Flow<Said> = flow {
        var pending = ""
        var isText = false
        answer.collect { piece ->
            pending += piece
            val start = pending.trimStart()
            isText = isText || (start.isNotEmpty() && OPENINGS.none { start.startsWith(it) || it.startsWith(start) })
            if (isText) {
                emit(Said.Text(pending))
                pending = ""
            }
        }
        val calls = if (isText) emptyList() else calls(pending, tools.map { it.name })
        if (calls.isEmpty() && pending.isNotEmpty()) emit(Said.Text(pending))
        calls.forEach { emit(it) }
    }

    private fun calls(text: String, names: List<String>): List<Said.Call> {
        val list = parsed(text.trim().replace(FENCE, "")) as? List<*> ?: return emptyList()
        val calls = list.map { item ->
            val call = item as? Map<*, *>
            val name = call?.get("name") as? String
            val arguments = call?.get("parameters") as? Map<*, *>
            if (name == null || name !in names || arguments == null) return emptyList()
            Said.Call(name, toJson(arguments))
        }
        return calls
    }

    private fun parsed(text: String): Any? = try {
        JsonReader.parse(text.toByteArray())
    } catch (error: JsonException) {
        null
    }
}
