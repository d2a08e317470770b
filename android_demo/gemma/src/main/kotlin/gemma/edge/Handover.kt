package gemma.edge

import java.util.concurrent.atomic.AtomicInteger

/** What an answer is to be like. */
internal class Wanted(val params: SamplingParams, val maxTokens: Int, val stop: List<String>)

/**
 * An answer on its way to the collector. If the answer is cancelled, the side that makes it cannot know whether the collector received the
 * last piece, because a handover may succeed and still be reported as cancelled. Therefore the collector's side counts the pieces.
 */
internal class Handover {
    /** The text of all pieces that were offered. */
    val text = StringBuilder()
    private val ends = ArrayList<Int>() // length of the text after each piece
    private val received = AtomicInteger()

    /** Add a piece to the text and return it. */
    fun offer(piece: String): String {
        text.append(piece)
        ends += text.length
        return piece
    }

    /** Count a piece before the collector receives it. False if the answer was cut before, so that the piece must be dropped. */
    fun receive(): Boolean = received.updateAndGet { if (it < 0) it else it + 1 } > 0

    /**
     * End a cancelled answer after the last piece that was received; later pieces are dropped.
     *
     * @return how many pieces were dropped.
     */
    fun cut(): Int {
        val count = received.getAndSet(CUT)
        text.setLength(if (count == 0) 0 else ends[count - 1])
        return ends.size - count
    }

    private companion object {
        const val CUT = -1
    }
}
