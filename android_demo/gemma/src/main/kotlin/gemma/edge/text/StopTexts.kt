package gemma.edge.text

/**
 * Ends an answer at the first of some texts. Text that may be the beginning of one is held back until it is clear that it is not.
 *
 * @property stops the texts, none of them empty.
 */
internal class StopTexts(val stops: List<String>) {
    private var pending = ""

    /** Whether one of the texts has come. */
    var found = false
        private set

    /** The text that is certain after the next piece; the stop text and what follows it are dropped. */
    fun push(piece: String): String {
        pending += piece
        val place = stops.map { pending.indexOf(it) }.filter { it >= 0 }.minOrNull()
        if (place != null) {
            found = true
            return pending.take(place).also { pending = "" }
        }
        val held = stops.maxOfOrNull { stop -> (1 until stop.length).lastOrNull { pending.endsWith(stop.take(it)) } ?: 0 } ?: 0
        return pending.dropLast(held).also { pending = pending.takeLast(held) }
    }

    /** What is held back when the answer has ended. */
    fun rest(): String = pending.also { pending = "" }
}
