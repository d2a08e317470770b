package gemma.edge

import gemma.edge.text.TextHash

/** The text is not valid JSON, or not the JSON that the caller expects. */
internal class JsonException(message: String) : Exception(message)

/**
 * A pull reader of JSON over UTF-8 bytes. It does not copy strings, because a tokenizer.json has a million of them. It is strict enough
 * for files that a JSON library wrote, and does not detect every violation of the standard. Source: RFC 8259.
 */
internal class JsonReader(private val bytes: ByteArray) {
    private var position = 0

    /** The last scanned string, unescaped: the bytes of [text] from [start] up to, but not including, [end]. */
    var text: ByteArray = bytes
        private set
    var start = 0
        private set
    var end = 0
        private set

    /** The [TextHash] of the last scanned string. It is computed while scanning, which saves a second pass over 10 MB. */
    var hash = 0L
        private set

    private var scratch = ByteArray(64)

    /** Read an object; [each] is called after every key and must read its value. */
    inline fun readObject(each: (key: String) -> Unit) {
        expect('{')
        if (taken('}')) return
        do {
            val key = readString()
            expect(':')
            each(key)
        } while (taken(','))
        expect('}')
    }

    /** Read an object without making strings of its keys, which are in [text]; [each] must read the colon and the value. */
    inline fun readRawObject(each: () -> Unit) {
        expect('{')
        if (taken('}')) return
        do {
            scanString()
            each()
        } while (taken(','))
        expect('}')
    }

    /** Read an array; [each] is called for every element and must read it. */
    inline fun readArray(each: () -> Unit) {
        expect('[')
        if (taken(']')) return
        do each() while (taken(','))
        expect(']')
    }

    fun readString(): String {
        scanString()
        return String(text, start, end - start, Charsets.UTF_8)
    }

    /** Read a whole number of at most nine digits. */
    fun readInt(): Int {
        skipBlanks()
        val first = position
        var value = 0
        while (position < bytes.size && bytes[position] in DIGITS) value = value * 10 + (bytes[position++] - '0'.code)
        if (position == first || position - first > 9) fail("a whole number")
        return value
    }

    /** Read any value, as Map, List, String, Long, Double, Boolean or null, of at most [depth] nested levels. */
    fun readValue(depth: Int = DEEPEST): Any? = when (peek()) {
        '{' -> LinkedHashMap<String, Any?>().also { map -> readObject { key -> map[key] = readValue(deeper(depth)) } }
        '[' -> ArrayList<Any?>().also { list -> readArray { list.add(readValue(deeper(depth))) } }
        '"' -> readString()
        't' -> literal("true", true)
        'f' -> literal("false", false)
        'n' -> literal("null", null)
        else -> readNumber()
    }

    /** The next character that is not a blank; NUL at the end of the text. */
    fun peek(): Char {
        skipBlanks()
        return if (position < bytes.size) bytes[position].toInt().toChar() else '\u0000'
    }

    /** Check that only blanks follow. */
    fun expectEnd() {
        skipBlanks()
        if (position != bytes.size) fail("the end")
    }

    /** Move past a character if it is the next one, and say whether it was. */
    fun taken(character: Char): Boolean = (peek() == character).also { if (it) position++ }

    fun expect(character: Char) {
        if (!taken(character)) fail("'$character'")
    }

    /** Read a string and describe it in [text], [start], [end] and [hash]. */
    fun scanString() {
        expect('"')
        val first = position
        var hashed = TextHash.EMPTY
        for (at in first until bytes.size) {
            val byte = bytes[at]
            if (byte == QUOTE) {
                position = at + 1
                return scanned(bytes, first, at, hashed)
            }
            if (byte == BACKSLASH) return unescape(first)
            hashed = TextHash.next(hashed, byte)
        }
        position = bytes.size
        fail("the end of a string")
    }

    private fun scanned(text: ByteArray, start: Int, end: Int, hash: Long) {
        this.text = text
        this.start = start
        this.end = end
        this.hash = hash
    }

    private fun unescape(first: Int) {
        var length = 0
        fun put(byte: Int) {
            if (length == scratch.size) scratch = scratch.copyOf(2 * length)
            scratch[length++] = byte.toByte()
        }
        position = first
        while (true) {
            if (position >= bytes.size) fail("the end of a string")
            val byte = bytes[position++]
            if (byte == QUOTE) break
            if (byte != BACKSLASH) {
                put(byte.toInt())
                continue
            }
            if (position >= bytes.size) fail("an escape")
            when (val escape = bytes[position++].toInt().toChar()) {
                'n' -> put('\n'.code)
                't' -> put('\t'.code)
                'r' -> put('\r'.code)
                'b' -> put('\b'.code)
                'f' -> put(0x0C)
                'u' -> String(Character.toChars(codePoint())).toByteArray().forEach { put(it.toInt()) }
                '"', '\\', '/' -> put(escape.code)
                else -> fail("an escape")
            }
        }
        scanned(scratch, 0, length, TextHash.of(scratch, 0, length))
    }

    private fun codePoint(): Int {
        val high = hex4()
        if (!Character.isHighSurrogate(high.toChar())) return high
        if (position + 6 > bytes.size || bytes[position] != BACKSLASH || bytes[position + 1] != 'u'.code.toByte()) {
            fail("the other half of a surrogate pair")
        }
        position += 2
        val low = hex4().toChar()
        if (!Character.isLowSurrogate(low)) fail("the other half of a surrogate pair")
        return Character.toCodePoint(high.toChar(), low)
    }

    private fun hex4(): Int {
        if (position + 4 > bytes.size) fail("four hexadecimal digits")
        val value = String(bytes, position, 4, Charsets.ISO_8859_1).toIntOrNull(16) ?: fail("four hexadecimal digits")
        position += 4
        return value
    }

    private fun readNumber(): Any {
        val first = position
        while (position < bytes.size && bytes[position].toInt().toChar() in NUMBER) position++
        val number = String(bytes, first, position - first, Charsets.ISO_8859_1)
        return number.toLongOrNull() ?: number.toDoubleOrNull() ?: fail("a value")
    }

    private fun <T> literal(word: String, value: T): T {
        for (character in word) if (position >= bytes.size || bytes[position++].toInt().toChar() != character) fail(word)
        return value
    }

    private fun deeper(depth: Int): Int = if (depth > 0) depth - 1 else fail("at most $DEEPEST levels")

    private fun skipBlanks() {
        while (position < bytes.size && bytes[position] <= SPACE && bytes[position] >= 0) position++
    }

    private fun fail(expected: String): Nothing = throw JsonException("byte $position: $expected expected")

    companion object {
        private const val QUOTE = '"'.code.toByte()
        private const val BACKSLASH = '\\'.code.toByte()
        private const val SPACE = ' '.code.toByte()
        private val DIGITS = '0'.code.toByte()..'9'.code.toByte()
        private const val NUMBER = "+-.0123456789eE"
        private const val DEEPEST = 100

        /** A whole document. */
        fun parse(bytes: ByteArray): Any? {
            val reader = JsonReader(bytes)
            return reader.readValue().also { reader.expectEnd() }
        }
    }
}

/**
 * A value of maps, lists, strings, numbers, booleans and null as JSON, in the format of Python's `json.dumps`. Infinities and NaN, for
 * which JSON has no text, become null.
 */
internal fun toJson(value: Any?): String = buildString { appendJson(value) }

private fun StringBuilder.appendJson(value: Any?) {
    when (value) {
        is Map<*, *> -> appendAll(value.entries, '{', '}') { (key, item) ->
            appendText(key as String)
            append(": ")
            appendJson(item)
        }
        is List<*> -> appendAll(value, '[', ']') { appendJson(it) }
        is String -> appendText(value)
        is Double -> append(if (value.isFinite()) value.toString() else "null")
        is Number, is Boolean, null -> append(value.toString())
        else -> throw IllegalArgumentException("no JSON for ${value::class}")
    }
}

private inline fun <T> StringBuilder.appendAll(items: Collection<T>, open: Char, close: Char, each: (T) -> Unit) {
    append(open)
    items.forEachIndexed { index, item ->
        if (index > 0) append(", ")
        each(item)
    }
    append(close)
}

private fun StringBuilder.appendText(text: String) {
    append('"')
    for (character in text) {
        val escape = ESCAPES[character]
        when {
            escape != null -> append('\\').append(escape)
            character in ' '..'~' -> append(character)
            else -> append("\\u%04x".format(character.code))
        }
    }
    append('"')
}

private val ESCAPES = mapOf('"' to '"', '\\' to '\\', '\n' to 'n', '\r' to 'r', '\t' to 't', '\b' to 'b', '\u000c' to 'f')
