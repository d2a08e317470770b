package gemma.edge.app

import android.content.Context
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.GemmaException
import java.io.File
import java.io.IOException
import java.io.InputStream

/** A folder to import a model from. */
interface Source {
    val name: String

    /** All files in the folder and its subfolders. */
    fun files(): List<SourceFile>
}

/** One file of a [Source]. Its [path] is relative to the source and written with slashes. */
class SourceFile(val path: String, val bytes: Long, val open: () -> InputStream)

/** The progress of an import: first all files are copied, then they are checked. */
sealed interface ImportStep {
    val percent: Int

    data class Copying(override val percent: Int) : ImportStep

    data class Checking(override val percent: Int) : ImportStep
}

/** The bundles in the app's own storage. Its functions read and write files, so do not call them on the main thread. */
class BundleStore(private val context: Context) {
    private val root = File(context.filesDir, "bundles")
    private val preferences = context.getSharedPreferences("bundles", Context.MODE_PRIVATE)

    /** All bundles, sorted by name. */
    fun list(): List<File> = root.listFiles { file -> !file.name.startsWith(".") }.orEmpty().sortedBy { it.name }

    /** The bundle that the user chose last, or the first one if that is gone; null if there are no bundles. */
    fun selected(): File? = list().let { all -> all.firstOrNull { it.name == preferences.getString(SELECTED, null) } ?: all.firstOrNull() }

    /** Remember which bundle the user chose. */
    fun select(bundle: File) = preferences.edit().putString(SELECTED, bundle.name).apply()

    fun delete(bundle: File) {
        bundle.deleteRecursively()
    }

    /** Unpack the model that comes with the app, unless it was unpacked before. */
    fun installDemo() {
        if (preferences.getBoolean(DEMO_INSTALLED, false)) return
        import(AssetSource(context, DEMO)) {}
        preferences.edit().putBoolean(DEMO_INSTALLED, true).apply()
    }

    /**
     * Copy a bundle and check the hash of every file. If anything fails, nothing is left of the copy.
     *
     * @param progress called after each block of bytes.
     * @return the folder of the copy.
     * @throws GemmaException the source is not a bundle or is damaged, or a bundle of that name exists.
     * @throws IOException there is not enough space, or the source cannot be read.
     */
    fun import(source: Source, progress: (ImportStep) -> Unit): File {
        val target = File(root, source.name)
        if (target.exists()) throw BundleException("there is already a model named ${source.name}; delete it first")
        val files = source.files()
        if (files.none { it.path == "manifest.json" }) {
            throw BundleException("${source.name} is not a bundle: it has no manifest.json; choose a folder that gemma-export made")
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
            val free = folder.usableSpace shr 20
            throw IOException("the model has ${total shr 20} MiB, but only $free MiB are free; make room on the device")
        }
        val block = ByteArray(1 shl 20)
        var done = 0L
        for (file in files) {
            val target = File(folder, file.path)
            if (!target.canonicalPath.startsWith(folder.canonicalPath + File.separator)) {
                throw BundleException("${file.path} lies outside the bundle")
            }
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
        /** The name of the bundle in the APK's assets. */
        const val DEMO = "tiny-gemma2"
        private const val SELECTED = "selected"
        private const val DEMO_INSTALLED = "demo_installed"
    }
}
