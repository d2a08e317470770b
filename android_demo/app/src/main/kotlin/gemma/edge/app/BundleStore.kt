package gemma.edge.app

import android.content.Context
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.GemmaException
import java.io.File
import java.io.IOException
import java.io.InputStream

/** A folder to import from: what the system's file picker gave, or a real one in tests. */
interface Source {
    val name: String

    /** Every file below it. */
    fun files(): List<SourceFile>
}

/** One file of a [Source]; [path] has slashes and is relative to it. */
class SourceFile(val path: String, val bytes: Long, val open: () -> InputStream)

/** How far an import is. */
sealed interface ImportStep {
    val percent: Int

    data class Copying(override val percent: Int) : ImportStep

    data class Checking(override val percent: Int) : ImportStep
}

/** The bundles in the app's own storage. All of it reads and writes files: not on the main thread. */
class BundleStore(private val context: Context) {
    private val root = File(context.filesDir, "bundles")
    private val preferences = context.getSharedPreferences("bundles", Context.MODE_PRIVATE)

    /** Every bundle, by name. */
    fun list(): List<File> = root.listFiles { file -> !file.name.startsWith(".") }.orEmpty().sortedBy { it.name }

    /** The bundle that the user chose last, else the first one; null where there is none. */
    fun selected(): File? = list().let { all -> all.firstOrNull { it.name == preferences.getString(SELECTED, null) } ?: all.firstOrNull() }

    /** Remember a choice. */
    fun select(bundle: File) = preferences.edit().putString(SELECTED, bundle.name).apply()

    fun delete(bundle: File) {
        bundle.deleteRecursively()
    }

    /** Unpack the model that the app brings along, once. */
    fun installDemo() {
        if (preferences.getBoolean(DEMO_INSTALLED, false)) return
        import(AssetSource(context, DEMO)) {}
        preferences.edit().putBoolean(DEMO_INSTALLED, true).apply()
    }

    /**
     * Copy a bundle and check every hash; nothing is left when it fails.
     *
     * @throws GemmaException no bundle, a damaged one, or one of that name is there already.
     * @throws IOException no space, or the source cannot be read.
     */
    fun import(source: Source, progress: (ImportStep) -> Unit): File {
        val target = File(root, source.name)
        if (target.exists()) throw BundleException("a model named ${source.name} is there already; delete it first")
        val files = source.files()
        if (files.none { it.path == "manifest.json" }) {
            throw BundleException("${source.name} is not a bundle: no manifest.json in it; choose the folder that gemma-export made")
        }
        val partial = File(root, ".${source.name}.partial")
        partial.deleteRecursively()
        try {
            copy(files, partial, progress)
            val bundle = Bundle.open(partial)
            bundle.checkHashes { done -> progress(ImportStep.Checking(percent(done, bundle.bytes))) }
            if (!partial.renameTo(target)) throw IOException("cannot write $target")
            return target
        } finally {
            partial.deleteRecursively()
        }
    }

    private fun copy(files: List<SourceFile>, folder: File, progress: (ImportStep) -> Unit) {
        folder.mkdirs()
        val total = files.sumOf { it.bytes }
        if (total > folder.usableSpace) {
            throw IOException("${total shr 20} MiB to copy and ${folder.usableSpace shr 20} MiB free; make room on the device")
        }
        val block = ByteArray(1 shl 20)
        var done = 0L
        for (file in files) {
            val target = File(folder, file.path)
            if (!target.canonicalPath.startsWith(folder.canonicalPath + File.separator)) throw BundleException("${file.path} lies outside the bundle")
            target.parentFile!!.mkdirs()
            file.open().use { input ->
                target.outputStream().use { output ->
                    while (true) {
                        val read = input.read(block)
                        if (read < 0) break
                        output.write(block, 0, read)
                        done += read
                        progress(ImportStep.Copying(percent(done, total)))
                    }
                }
            }
        }
    }

    private fun percent(done: Long, total: Long) = (100 * done / maxOf(total, 1)).toInt()

    companion object {
        /** The bundle in the APK's assets. */
        const val DEMO = "tiny-gemma2"
        private const val SELECTED = "selected"
        private const val DEMO_INSTALLED = "demo_installed"
    }
}
