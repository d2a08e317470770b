package gemma.edge.app.bundles

import gemma.edge.BundleException
import java.io.IOException
import java.io.InputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.util.zip.Inflater
import java.util.zip.InflaterInputStream

/**
 * A bundle in a zip, also in a folder of it. The zip is read where it lies, so it takes no room of its own; java.util.zip reads no file
 * that another app owns. Source of the format: PKWARE's APPNOTE.TXT.
 *
 * @param name of the model.
 * @param channel the zip.
 * @param release called when the zip is not needed any more.
 */
class ZipSource(override val name: String, private val channel: FileChannel, private val release: () -> Unit = {}) : Source {
    private class Entry(val path: String, val deflated: Boolean, val packed: Long, val bytes: Long, val header: Long)

    override fun files(): List<SourceFile> {
        val entries = entries()
        // the bundle is where its manifest is
        val folder = entries.map { it.path }.filter { it == MANIFEST || it.endsWith("/$MANIFEST") }.minByOrNull { it.length }?.removeSuffix(MANIFEST)
        return entries.filter { it.path.startsWith(folder.orEmpty()) }
            .map { entry -> SourceFile(entry.path.removePrefix(folder.orEmpty()), entry.bytes) { from -> open(entry).behind(from) } }
    }

    override fun close() {
        channel.close()
        release()
    }

    private fun open(entry: Entry): InputStream {
        val header = read(entry.header, LOCAL_BYTES)
        if (header.getInt(0) != LOCAL) throw damaged("${entry.path} is not where the directory says")
        val start = entry.header + LOCAL_BYTES + header.short(26) + header.short(28)
        val packed = Part(start, start + entry.packed)
        return if (entry.deflated) InflaterInputStream(packed, Inflater(true), BUFFER_BYTES) else packed
    }

    private fun entries(): List<Entry> {
        val end = endOfDirectory()
        val zip64 = zip64End(end.second)
        val count = zip64?.getLong(32) ?: end.first.short(10).toLong()
        val bytes = zip64?.getLong(40) ?: end.first.int(12)
        val start = zip64?.getLong(48) ?: end.first.int(16)
        if (count !in 0..MAX_ENTRIES || bytes !in 0..MAX_DIRECTORY_BYTES) throw damaged("its directory is too large")
        val directory = read(start, bytes.toInt())
        var at = 0
        return List(count.toInt()) {
            if (at + CENTRAL_BYTES > bytes || directory.getInt(at) != CENTRAL) throw damaged("its directory ends early")
            val next = at + CENTRAL_BYTES + directory.short(at + 28) + directory.short(at + 30) + directory.short(at + 32)
            if (next > bytes) throw damaged("its directory ends early")
            entry(directory, at).also { at = next }
        }.filter { !it.path.endsWith("/") }
    }

    private fun entry(directory: ByteBuffer, at: Int): Entry {
        val nameBytes = ByteArray(directory.short(at + 28)) { directory.get(at + CENTRAL_BYTES + it) }
        val path = String(nameBytes, Charsets.UTF_8)
        val method = directory.short(at + 10)
        if (directory.short(at + 8) and ENCRYPTED != 0 || method !in METHODS) throw damaged("$path is packed in a way that this app cannot read")
        val extra = at + CENTRAL_BYTES + nameBytes.size
        // sizes that do not fit into 32 bits are in the extra field, in this order
        var large = zip64Field(directory, extra, extra + directory.short(at + 30))
        fun size(place: Int): Long {
            val small = directory.int(at + place)
            if (small != SMALL_MAX) return small
            if (large < 0 || large + Long.SIZE_BYTES > directory.limit()) throw damaged("$path has no size")
            return directory.getLong(large).also { large += Long.SIZE_BYTES }
        }
        val bytes = size(24)
        val packed = size(20)
        return Entry(path, method == DEFLATED, packed, bytes, size(42))
    }

    private fun zip64Field(directory: ByteBuffer, start: Int, end: Int): Int {
        var at = start
        while (at + 4 <= end) {
            if (directory.short(at) == ZIP64_FIELD) return at + 4
            at += 4 + directory.short(at + 2)
        }
        return -1
    }

    /** The record at the end of the zip, and where it lies. */
    private fun endOfDirectory(): Pair<ByteBuffer, Long> {
        val size = channel.size()
        val tail = minOf(size, END_BYTES + MAX_COMMENT).toInt()
        val bytes = read(size - tail, tail)
        val at = (tail - END_BYTES downTo 0).firstOrNull { bytes.getInt(it) == END } ?: throw damaged("it is not a zip")
        return read(size - tail + at, END_BYTES) to size - tail + at
    }

    private fun zip64End(end: Long): ByteBuffer? {
        if (end < LOCATOR_BYTES) return null
        val locator = read(end - LOCATOR_BYTES, LOCATOR_BYTES)
        if (locator.getInt(0) != LOCATOR) return null
        return read(locator.getLong(8), ZIP64_END_BYTES).also { if (it.getInt(0) != ZIP64_END) throw damaged("its directory is missing") }
    }

    private fun read(start: Long, count: Int): ByteBuffer {
        val buffer = ByteBuffer.allocate(count).order(ByteOrder.LITTLE_ENDIAN)
        if (start < 0 || start + count > channel.size()) throw damaged("it ends early")
        while (buffer.hasRemaining()) if (channel.read(buffer, start + buffer.position()) < 0) throw damaged("it ends early")
        return buffer
    }

    private fun damaged(what: String) = BundleException("the zip of $name cannot be used: $what; pack the bundle again")

    private fun ByteBuffer.short(at: Int) = getShort(at).toInt() and 0xffff

    private fun ByteBuffer.int(at: Int) = getInt(at).toLong() and SMALL_MAX

    /** The bytes of the zip from [at] up to, but not including, [end]. */
    private inner class Part(private var at: Long, private val end: Long) : InputStream() {
        override fun read(): Int = ByteArray(1).let { if (read(it, 0, 1) < 0) -1 else it[0].toInt() and 0xff }

        override fun read(bytes: ByteArray, offset: Int, length: Int): Int {
            if (at >= end) return -1
            val read = channel.read(ByteBuffer.wrap(bytes, offset, minOf(length.toLong(), end - at).toInt()), at)
            if (read < 0) throw IOException("the zip of $name ends early")
            at += read
            return read
        }

        override fun skip(bytes: Long): Long = minOf(bytes, end - at).coerceAtLeast(0).also { at += it }
    }

    private companion object {
        const val MANIFEST = "manifest.json"
        const val LOCAL = 0x04034b50
        const val LOCAL_BYTES = 30
        const val CENTRAL = 0x02014b50
        const val CENTRAL_BYTES = 46
        const val END = 0x06054b50
        const val END_BYTES = 22
        const val LOCATOR = 0x07064b50
        const val LOCATOR_BYTES = 20
        const val ZIP64_END = 0x06064b50
        const val ZIP64_END_BYTES = 56
        const val ZIP64_FIELD = 1
        const val SMALL_MAX = 0xffffffffL // a 32-bit size of this value stands in the extra field
        const val MAX_COMMENT = 0xffffL
        const val ENCRYPTED = 1
        const val DEFLATED = 8
        val METHODS = listOf(0, DEFLATED)
        const val BUFFER_BYTES = 1 shl 16
        const val MAX_ENTRIES = 100_000L
        const val MAX_DIRECTORY_BYTES = 64L shl 20
    }
}
