package gemma.edge.engine

import java.io.File
import java.security.MessageDigest

/** A SHA-256 in hexadecimal of the bytes that [fill] gives to the digest. */
@EngineApi
public fun sha256(fill: MessageDigest.() -> Unit): String =
    MessageDigest.getInstance("SHA-256").apply(fill).digest().joinToString("") { "%02x".format(it) }

/** The SHA-256 of a file; [progress] is called with the number of bytes of each block that was read. */
@EngineApi
public fun hashOf(path: File, progress: (bytes: Int) -> Unit = {}): String = sha256 {
    val block = ByteArray(1 shl 20)
    path.inputStream().use { input ->
        while (true) {
            val read = input.read(block)
            if (read < 0) break
            update(block, 0, read)
            progress(read)
        }
    }
}
