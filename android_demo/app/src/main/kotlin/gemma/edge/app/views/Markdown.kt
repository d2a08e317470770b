package gemma.edge.app.views

/** How a part of a rendered text looks. */
enum class TextStyle { BOLD, ITALIC, CODE, CODE_BLOCK, HEADING, BULLET }

/** A part of a rendered text, from [start] up to, but not including, [end]. */
data class StyledPart(val style: TextStyle, val start: Int, val end: Int)

/** A text without its Markdown signs, and how its parts look. */
data class StyledText(val text: String, val parts: List<StyledPart>)

/**
 * Reads the Markdown that models write: headings, bullets, bold, italic, code and blocks of code. A sign without its partner is
 * shown as it is, so a text that is still being written never looks broken. Tables, links and images stay as they were written.
 */
fun markdown(text: String): StyledText {
    val out = StringBuilder()
    val parts = ArrayList<StyledPart>()
    var block = -1 // where the open block of code begins in [out]
    for (line in text.split('\n')) {
        if (line.trimStart().startsWith(FENCE)) {
            if (block >= 0) parts += StyledPart(TextStyle.CODE_BLOCK, block, out.length)
            block = if (block >= 0) -1 else out.length
            continue
        }
        if (block >= 0) out.append(line) else appendLine(line, out, parts)
        out.append('\n')
    }
    if (block >= 0) parts += StyledPart(TextStyle.CODE_BLOCK, block, out.length)
    if (out.endsWith("\n")) out.setLength(out.length - 1) // the text's last line has no end
    return StyledText(out.toString(), parts.map { it.copy(end = minOf(it.end, out.length)) }.filter { it.end > it.start })
}

private fun appendLine(line: String, out: StringBuilder, parts: MutableList<StyledPart>) {
    val start = out.length
    val heading = HEADING.matchEntire(line)
    val bullet = BULLET.matchEntire(line)
    when {
        heading != null -> appendInline(heading.groupValues[1], out, parts)
        bullet != null -> appendInline(bullet.groupValues[1], out, parts)
        else -> return appendInline(line, out, parts)
    }
    parts += StyledPart(if (heading != null) TextStyle.HEADING else TextStyle.BULLET, start, out.length)
}

private fun appendInline(line: String, out: StringBuilder, parts: MutableList<StyledPart>) {
    var at = 0
    while (at < line.length) {
        val sign = SIGNS.firstOrNull { line.startsWith(it.first, at) }
        val end = sign?.let { endOf(line, it.first, at + it.first.length) } ?: -1
        if (sign == null || end < 0) {
            out.append(line[at++])
            continue
        }
        val start = out.length
        val inner = line.substring(at + sign.first.length, end)
        if (sign.second == TextStyle.CODE) out.append(inner) else appendInline(inner, out, parts)
        parts += StyledPart(sign.second, start, out.length)
        at = end + sign.first.length
    }
}

/** Where the partner of a sign is, if the sign opens something: what is inside has no blanks at its ends. */
private fun endOf(line: String, sign: String, from: Int): Int {
    if (from >= line.length || line[from].isWhitespace()) return -1
    var end = line.indexOf(sign, from + 1)
    while (end >= 0 && line[end - 1].isWhitespace()) end = line.indexOf(sign, end + 1)
    // of three signs in a row the first one belongs to what is inside
    while (end >= 0 && sign.length > 1 && line.startsWith(sign, end + 1)) end++
    return end
}

private const val FENCE = "```"
private val HEADING = Regex("#{1,6}\\s+(.*?)\\s*#*")
private val BULLET = Regex("\\s*[-*+]\\s+(.*)")

// the longer sign first; an underscore is part of many names, so it is no sign
private val SIGNS = listOf("`" to TextStyle.CODE, "**" to TextStyle.BOLD, "*" to TextStyle.ITALIC)
