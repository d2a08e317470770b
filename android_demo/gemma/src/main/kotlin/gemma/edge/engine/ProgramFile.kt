package gemma.edge.engine

import gemma.edge.Backend
import gemma.edge.Bundle
import gemma.edge.BundleException
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * The file that a backend's engine loads, for a check before a native library maps it: such a library ends the process if an offset in
 * the file leads nowhere.
 *
 * @throws BundleException the file is missing, or has another size than the manifest says.
 */
@EngineApi
public class ProgramFile(private val bundle: Bundle, backend: Backend) {
    private val entry = backend.files.first { it.name == backend.program }

    /** Where it lies. */
    public val path: File = bundle.file(backend.program)

    /** Its size. */
    public val bytes: Long = path.length()

    init {
        if (bytes != entry.bytes) throw BundleException("$path: $bytes bytes, the manifest says ${entry.bytes}; import the bundle again")
    }

    /** Its first [count] bytes, mapped; zeros behind the end of a shorter file. */
    public fun beginning(count: Int): ByteBuffer {
        if (count > bytes) return ByteBuffer.allocate(count).order(ByteOrder.LITTLE_ENDIAN)
        try {
            val mapped = RandomAccessFile(path, "r").use { it.channel.map(FileChannel.MapMode.READ_ONLY, 0, count.toLong()) }
            return mapped.order(ByteOrder.LITTLE_ENDIAN)
        } catch (error: IOException) {
            throw BundleException("$path cannot be read (${error.message}); import the bundle again", error)
        }
    }

    /**
     * Compare the whole file with the hash in the manifest. Reads all of it: seconds per gigabyte.
     *
     * @throws BundleException the file was changed.
     */
    public fun checkHash(): Unit = bundle.checkHash(entry)

    /** Refuse the file if [act] finds it damaged. */
    public fun check(act: () -> Unit) {
        try {
            act()
        } catch (error: DamagedException) {
            refuse(error.message.orEmpty())
        }
    }

    /** Refuse the file. */
    public fun refuse(problem: String): Nothing = throw BundleException("$path is damaged: $problem; import the bundle again")
}

/** The text of four bytes, by which file formats are known. */
@EngineApi
public fun ByteBuffer.tag(at: Int): String = String(ByteArray(4) { get(at + it) }, Charsets.ISO_8859_1)
