package gemma.edge.state

import gemma.edge.JsonException
import gemma.edge.JsonReader
import gemma.edge.Message
import gemma.edge.Node
import gemma.edge.toJson

/**
 * A conversation as it is saved with a runtime's state. `Session.save` in runtimes/generation/session.py writes the same notes.
 *
 * @property ids the token ids of the conversation, in the order in which the model read and wrote them. The last one may not be fed yet.
 *   Empty if they are not known.
 * @property texts the text of these ids, in every form in which a template may write it.
 * @property before what Python put in front of the user's words in the first turn.
 */
internal class SavedConversation(val messages: List<Message>, val ids: IntArray, val texts: Set<String>, val before: String) {
    fun toNotes(): String {
        val said = mapOf(
            "messages" to messages.map { mapOf("role" to it.role, "content" to it.content) },
            "ids" to ids.asList(),
            "texts" to texts.toList(),
        )
        return toJson(mapOf("said" to if (messages.isEmpty()) listOf(NOTHING) else listOf(NOTHING, said), "before" to before))
    }

    companion object {
        // Python saves the conversation after every turn, so that turns can be taken back; Kotlin saves it before the first and after the
        // last turn only
        private val NOTHING = mapOf("messages" to emptyList<Any>(), "ids" to emptyList<Any>(), "texts" to emptyList<Any>())

        /** @throws JsonException the notes are not those of a conversation. */
        fun of(notes: String): SavedConversation {
            val root = Node(JsonReader.parse(notes.toByteArray()), "notes")
            val said = root["said"].list.lastOrNull()
                ?: throw JsonException("in the notes, 'said' is empty")
            return SavedConversation(
                said["messages"].list.map { Message(it["role"].string, it["content"].string) },
                said["ids"].list.map { it.int(0..Int.MAX_VALUE) }.toIntArray(),
                said["texts"].list.map { it.string }.toSet(),
                root["before"].string,
            )
        }
    }
}
