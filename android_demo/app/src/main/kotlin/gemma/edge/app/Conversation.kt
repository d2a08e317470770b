package gemma.edge.app

import java.io.File
import java.io.IOException
import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject

/**
 * A conversation as it is kept on the device.
 *
 * @property id names its files.
 * @property title what the list shows.
 * @property model name of the model that gave the last answer.
 * @property systemPrompt goes before the first message.
 * @property changedMs when the last answer was given, in milliseconds since 1970.
 */
data class Conversation(
    val id: String,
    val title: String = "",
    val model: String = "",
    val systemPrompt: String = "",
    val changedMs: Long = 0,
    val messages: List<ChatMessage> = emptyList(),
) {
    /** The whole conversation as Markdown, for other apps; [user] is the user's name in it. */
    fun toMarkdown(user: String): String = buildString {
        append("# ").append(title).append("\n")
        for (message in messages) {
            append("\n**").append(if (message.byUser) user else model).append(":**\n\n").append(message.text.trim()).append("\n")
        }
    }

    companion object {
        private const val MAX_TITLE = 60

        /** The title of a conversation that begins with this message. */
        fun titleOf(text: String): String =
            text.trim().lineSequence().first().let { if (it.length <= MAX_TITLE) it else it.take(MAX_TITLE - 1).trimEnd() + "…" }
    }
}

/**
 * The conversations in a folder: for each a JSON file with what was said, and the model's state, so that nothing has to be read again.
 * Files are written whole or not at all. The functions read and write files, so do not call them on the main thread.
 */
class ConversationStore(private val folder: File) {
    /** All conversations, the newest first. A file that cannot be read is left out. */
    fun list(): List<Conversation> =
        folder.listFiles { file -> file.name.endsWith(END) }.orEmpty().mapNotNull { load(it.name.removeSuffix(END)) }.sortedByDescending { it.changedMs }

    /** A conversation; null if it is gone or damaged. */
    fun load(id: String): Conversation? = try {
        read(id, JSONObject(textOf(id).readText()))
    } catch (_: IOException) {
        null
    } catch (_: JSONException) {
        null
    }

    /** Write a conversation. */
    fun save(conversation: Conversation) {
        folder.mkdirs()
        val json = JSONObject()
            .put("title", conversation.title)
            .put("model", conversation.model)
            .put("system_prompt", conversation.systemPrompt)
            .put("changed_ms", conversation.changedMs)
            .put("texts", JSONArray(conversation.messages.map { it.text }))
        val partial = File(folder, ".${conversation.id}.partial")
        partial.writeText(json.toString())
        if (!partial.renameTo(textOf(conversation.id))) throw IOException("cannot write ${textOf(conversation.id)}")
    }

    /** Give a conversation another title; a blank one changes nothing. */
    fun rename(id: String, title: String) {
        if (title.isBlank()) return
        load(id)?.let { save(it.copy(title = Conversation.titleOf(title))) }
    }

    fun delete(id: String) {
        stateOf(id).delete()
        textOf(id).delete()
    }

    /** The file with the model's state after the conversation; it need not exist. */
    fun stateOf(id: String) = File(folder, "$id.state")

    private fun textOf(id: String) = File(folder, id + END)

    /** User and model take turns, so the texts are enough. */
    private fun read(id: String, json: JSONObject): Conversation {
        val texts = json.getJSONArray("texts").let { array -> List(array.length()) { array.getString(it) } }
        return Conversation(
            id = id,
            title = json.getString("title"),
            model = json.getString("model"),
            systemPrompt = json.getString("system_prompt"),
            changedMs = json.getLong("changed_ms"),
            messages = texts.mapIndexed { index, text -> ChatMessage(byUser = index % 2 == 0, text = text) },
        )
    }

    private companion object {
        const val END = ".json"
    }
}
