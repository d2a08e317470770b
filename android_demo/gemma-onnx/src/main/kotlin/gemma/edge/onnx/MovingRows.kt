package gemma.edge.onnx

import gemma.edge.CacheGeometry
import java.nio.FloatBuffer

/**
 * The rows of global layers that keep the beginning of a text. `MovingRows` in runtimes/engines/moving_rows.py does the same.
 *
 * The first P rows belong to the first P tokens. Behind them the others follow in order; when a buffer is full, those that no query needs
 * any more are dropped, and the rest moves down behind the first P. The attention has no window here: a bias hides a row that has left it.
 * So the row of position p is p, or p less what was dropped.
 *
 * @param move gives the buffers of these layers the rows with the numbers that its argument returns.
 */
internal class MovingRows(cache: CacheGeometry, private val move: (rows: (slots: Int) -> LongArray) -> Unit) {
    private val layers = cache.layers.filter { it.pinned > 0 }
    private val window = layers.first().window
    private val kept = layers.first().pinned
    private val slots = layers.minOf { it.slots }
    private var dropped = 0

    /** Begin anew. */
    fun clear() {
        dropped = 0
    }

    /** Move rows if [tokens] tokens from [position] on do not fit behind the others; the number of rows in use before them. */
    fun makeRoom(position: Int, tokens: Int): Int {
        if (position + tokens - dropped > slots) drop(position)
        return position - dropped
    }

    /** Write what is added to the scores of [tokens] queries from [position] on: (tokens, rows in use after them). */
    fun bias(position: Int, tokens: Int, pinned: Int, into: FloatBuffer) {
        val rows = position - dropped + tokens
        for (query in 0 until tokens) {
            for (row in 0 until rows) {
                val age = position + query - (if (row < kept) row else row + dropped)
                into.put(query * rows + row, if (age >= window && row >= pinned) HIDDEN else 0f)
            }
        }
    }

    /** Whether a text can go on at [position] after one was written up to [written]. */
    fun holds(position: Int, written: Int): Boolean {
        if (written - dropped > slots) return false // rows move before that
        return dropped == 0 || position - window + 1 >= dropped + kept
    }

    /** Drop as many rows as follows from the two numbers alone, for a copy of the buffers. */
    fun settle(position: Int, written: Int) {
        if (written > slots) drop(position)
    }

    /** Take over the buffers of a copy. */
    fun settled(position: Int, written: Int) {
        dropped = if (written > slots) needless(position) else 0
    }

    /** The number of rows behind the first ones that no query from [position] on sees. */
    private fun needless(position: Int) = maxOf(0, position - window + 1 - kept)

    /** Move the rows that queries from [position] on see to just behind the first ones. */
    private fun drop(position: Int) {
        val by = needless(position) - dropped
        if (by == 0) return
        val end = minOf(slots, position - dropped) - by // rows from here on are not moved
        move { slots -> LongArray(slots) { row -> (if (row in kept until end) row + by else row).toLong() } }
        dropped += by
    }

    private companion object {
        // HIDDEN: added to the score of a row that must not count.
        const val HIDDEN = -1e9f
    }
}
