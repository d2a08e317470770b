package gemma.edge.litert

import gemma.edge.Backend
import gemma.edge.Benchmark
import gemma.edge.Bundle
import gemma.edge.engine.hashOf
import gemma.edge.engine.sha256
import java.io.File

/**
 * The file with the weights as XNNPACK packs them. With it the next start maps a file instead of packing again, and all signatures share
 * one copy. XNNPACK does not compare the packed weights with the model. Therefore the folder is named by the hash of the model and the
 * version of this library, and the file by the hash of its own bytes, which is compared with them at every start.
 *
 * @property path the file to read or to write; null keeps none.
 */
internal class PackedWeights(private val fresh: File?, kept: File?) : AutoCloseable {
    val path: String? = (kept ?: fresh)?.path

    /** Keep what was packed, for the next start. */
    override fun close() {
        if (fresh != null && fresh.isFile) fresh.renameTo(File(fresh.parentFile, "$NAME-${hashOf(fresh)}"))
    }
}

/** The packed weights of a backend in a folder of the app; those of other models and of other versions are removed. */
internal fun packedWeights(bundle: Bundle, backend: Backend, cacheDir: File?): PackedWeights {
    if (cacheDir == null) return PackedWeights(null, null)
    val all = File(cacheDir, "gemma-packed")
    val key = sha256 { update("${hashOf(bundle.file(backend.program))} ${Benchmark.VERSION} ${System.getProperty("os.arch")}".toByteArray()) }
    val folder = File(all, key)
    all.listFiles().orEmpty().filter { it.name != key }.forEach { it.deleteRecursively() }
    if (!folder.isDirectory && !folder.mkdirs()) return PackedWeights(null, null)
    val kept = folder.listFiles().orEmpty().filter { it.isFile && it.name == "$NAME-${hashOf(it)}" }
    folder.listFiles().orEmpty().filter { it !in kept.take(1) }.forEach { it.deleteRecursively() } // damaged, or left by a process that ended
    return if (kept.isEmpty()) PackedWeights(File(folder, "new"), null) else PackedWeights(null, kept.first())
}

private const val NAME = "weights"
