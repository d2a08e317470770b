package gemma.edge.engine

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.charset.CharacterCodingException

/** The bytes are not a flatbuffer of the schema. */
@EngineApi
public class DamagedException(message: String) : RuntimeException(message)

/**
 * Checks a flatbuffer against a schema before a native library follows its offsets, which may lead anywhere in a damaged file.
 * `Verifier` in runtimes/engines/structure/flatbuffer.py does the same and explains the fields of a schema.
 *
 * @param data the file, or its beginning with the whole flatbuffer.
 * @param size of the flatbuffer.
 * @param schema tables by name, each with its fields in order.
 * @param unions Table.field to the kind of a union's table to its name in the schema. Other kinds are taken as numbers.
 * @param lowest the smallest index in a vector of indices; -1 where that stands for no index.
 */
@EngineApi
public abstract class Flatbuffer(
    data: ByteBuffer,
    private val size: Long,
    schema: Map<String, List<String?>>,
    private val unions: Map<String, Map<Long, String>>,
    private val lowest: Int = 0,
) {
    private val data = data.duplicate().order(ByteOrder.LITTLE_ENDIAN)
    private val schema = schema.mapValues { (_, fields) -> fields.map { it?.let(::Field) } }
    private val seen = HashSet<Pair<Long, String>>()

    /** How many tables of each kind the last vector of them had; with `*`, the longest one. */
    protected val counts: MutableMap<String, Long> = HashMap()

    /**
     * Follow every offset and index.
     *
     * @throws DamagedException one leads nowhere.
     */
    public fun check(root: String): Unit = table(follow(0), root)

    /** Check what a schema cannot express; [numbers] are the table's numbers by field. */
    protected abstract fun checkTable(name: String, numbers: Map<Int, Long>)

    private fun table(at: Long, name: String) {
        if (!seen.add(at to name)) return
        val (places, tableSize) = places(at)
        val fields = schema[name] ?: return // it holds only numbers, whose sizes are not known
        val numbers = HashMap<Int, Long>()
        for ((index, place) in places) {
            val field = fields.getOrNull(index) ?: damaged("$name has a field $index")
            val width = if (field.isNumber) field.width else 4
            if (place + width > tableSize) damaged("field $index of $name lies outside")
            if (field.isNumber) numbers[index] = number(at + place, width)
            if (field.isVector && !field.hasDigits) register(field.kind, number(follow(at + place), 4))
        }
        for ((index, place) in places) follow(name, index, fields[index]!!, at + place, numbers)
        checkTable(name, numbers)
    }

    private fun follow(name: String, index: Int, field: Field, at: Long, numbers: Map<Int, Long>) {
        val limit = field.limit?.let { counts[it] ?: 0 }
        val missing = { damaged("field $index of $name names a ${field.limit?.trim('*')} that is not there") }
        when {
            field.isVector && field.hasDigits -> {
                val (start, count) = vector(follow(at), field.width)
                if (limit != null) for (i in 0 until count) if (signed(start + 4 * i) !in lowest until limit) missing()
            }
            field.isVector -> {
                val (start, count) = vector(follow(at), 4)
                for (i in 0 until count) table(follow(start + 4 * i), field.kind)
            }
            field.kind == "s" -> {
                val (start, count) = vector(follow(at), 1)
                if (number(start + count, 1) != 0L) damaged("a text in $name has no end")
                decode(start, count)
            }
            field.kind.startsWith("?") -> {
                val kind = numbers[field.kind.drop(1).toInt()] ?: 0
                table(follow(at), unions["$name.$index"]?.get(kind) ?: NUMBERS)
            }
            !field.isNumber -> table(follow(at), field.kind)
            limit != null && numbers.getValue(index) !in 0 until limit -> missing()
        }
    }

    /** Where a table's fields lie, from its start, by number; and the table's size. */
    private fun places(at: Long): Pair<Map<Int, Int>, Long> {
        val numbers = at - signed(at)
        val length = number(numbers, 2)
        val tableSize = number(numbers + 2, 2)
        if (length < 4 || length % 2 != 0L || tableSize < 4) damaged("a table has no fields")
        inside(at, tableSize)
        inside(numbers, length)
        val places = (0 until (length / 2 - 2).toInt()).associateWith { number(numbers + 4 + 2 * it, 2).toInt() }
        if (places.values.any { it >= tableSize }) damaged("a field lies outside of its table")
        return places.filterValues { it != 0 } to tableSize
    }

    private fun register(kind: String, count: Long) {
        counts[kind] = count
        counts["$kind*"] = maxOf(count, counts["$kind*"] ?: 0)
    }

    /** Where a vector's items begin, and how many there are. */
    private fun vector(at: Long, width: Int): Pair<Long, Long> {
        val count = number(at, 4)
        if (at + 4 + count * width > size || (at + 4) % width != 0L) damaged("a vector lies outside")
        return at + 4 to count
    }

    private fun follow(at: Long): Long = at + number(at, 4)

    private fun number(at: Long, width: Int): Long {
        if (at % width != 0L) damaged("a number is not aligned")
        inside(at, width.toLong())
        val place = at.toInt()
        return when (width) {
            1 -> data.get(place).toLong() and 0xff
            2 -> data.getShort(place).toLong() and 0xffff
            4 -> data.getInt(place).toLong() and 0xffff_ffff
            else -> data.getLong(place)
        }
    }

    private fun signed(at: Long): Int {
        inside(at, 4)
        return data.getInt(at.toInt())
    }

    private fun decode(start: Long, count: Long) {
        val bytes = ByteArray(count.toInt()) { data.get((start + it).toInt()) }
        try {
            Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes))
        } catch (_: CharacterCodingException) {
            damaged("a text is not UTF-8")
        }
    }

    private fun inside(at: Long, count: Long) {
        if (at < 0 || at > size - count) damaged("an offset leads out of the file")
    }

    /** Refuse the file. */
    protected fun damaged(problem: String): Nothing = throw DamagedException(problem)

    /** Whether [bytes] from [start] on do not lie in the first [limit] bytes. */
    protected fun outside(start: Long, bytes: Long, limit: Long): Boolean = start < 0 || bytes < 0 || start > limit || bytes > limit - start

    /** A field of a schema. */
    private class Field(text: String) {
        val isVector = text.startsWith("[")
        val limit: String? = text.substringAfter('<', "").ifEmpty { null }
        val kind = text.substringBefore('<').trim('[', ']')
        val hasDigits = kind.all { it.isDigit() }
        val isNumber = hasDigits && !isVector
        val width = if (hasDigits) kind.toInt() else 4
    }

    private companion object {
        const val NUMBERS = "numbers"
    }
}
