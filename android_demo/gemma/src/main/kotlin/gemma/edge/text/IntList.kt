package gemma.edge.text

/** A growing list of unboxed ints. It keeps at least the last [keep] of them, and never more than about twice as many. */
internal class IntList(private val keep: Int = Int.MAX_VALUE) {
    private var items = IntArray(16)
    var size = 0
        private set

    fun add(item: Int) {
        if (size == items.size) items = items.copyOf(2 * size)
        items[size++] = item
        if (size / 2 >= keep) keepLast()
    }

    fun addAll(more: IntArray) = more.forEach(::add)

    fun clear() {
        size = 0
    }

    fun removeLast(count: Int) {
        size -= count
    }

    fun firstOrMinus1(): Int = if (size > 0) items[0] else -1

    fun toArray(): IntArray = items.copyOf(size)

    private fun keepLast() {
        items.copyInto(items, 0, size - keep, size)
        size = keep
    }
}
