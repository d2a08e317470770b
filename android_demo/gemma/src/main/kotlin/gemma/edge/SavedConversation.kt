package gemma.edge

/**
 * A conversation as it is kept beside a runtime's state; `Session.save` in runtimes/generation/session.py writes the same notes.
 *
 * @property ids of it as the model read and wrote them; the last one may not be fed yet. None where they are not known.
 * @property texts of these ids, in the ways a template may write them.
 */
internal class SavedConversation(val messages: List<Message>, val ids: IntArray, val texts: Set<String>) {
    fun toNotes(): String {
        val said = mapOf(
            "messages" to messages.map { mapOf("role" to it.role, "content" to it.content) },
            "ids" to ids.asList(),
            "texts" to texts.toList(),
        )
        return toJson(mapOf("said" to if (messages.isEmpty()) listOf(NOTHING) else listOf(NOTHING, said), "before" to ""))
    }

    companion object {
        // Python keeps a conversation after each turn, so that turns can be taken back; here it is the first and the last of them
        private val NOTHING = mapOf("messages" to emptyList<Any>(), "ids" to emptyList<Any>(), "texts" to emptyList<Any>())

        /** @throws JsonException the notes are none of a conversation. */
        fun of(notes: String): SavedConversation {
            val said = Node(JsonReader.parse(notes.toByteArray()), "notes")["said"].list.lastOrNull()
                ?: throw JsonException("notes: said is empty")
            return SavedConversation(
                said["messages"].list.map { Message(it["role"].string, it["content"].string) },
                said["ids"].list.map { it.int(0..Int.MAX_VALUE) }.toIntArray(),
                said["texts"].list.map { it.string }.toSet(),
            )
        }
    }
}
