package gemma.edge.app.bundles

import android.content.Context
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.GemmaException
import gemma.edge.app.Engine
import java.io.EOFException
import java.io.File
import java.io.FileOutputStream
import java.io.IOException

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

    /**
     * The backend that the user chose for a bundle; null for the first one that has an engine, also where the chosen one has none.
     *
     * @param among those of the bundle that have an engine.
     */
    fun backend(bundle: File, among: List<String> = Engine.backendsOf(bundle)): String? =
        preferences.getString(BACKEND + bundle.name, null)?.takeIf { it in among }

    /** Remember which backend the user chose for a bundle; null for the first one that has an engine. */
    fun chooseBackend(bundle: File, backend: String?) = preferences.edit().putString(BACKEND + bundle.name, backend).apply()

    /** The import that was begun last; null if there was none. */
    fun lastImport(): ImportRequest? {
        val (kind, address) = preferences.getString(LAST_IMPORT, null)?.split(' ', limit = 2) ?: return null
        return ImportRequest(ImportRequest.Kind.valueOf(kind), address)
    }

    fun rememberImport(request: ImportRequest) = preferences.edit().putString(LAST_IMPORT, "${request.kind} ${request.address}").apply()

    /** What imports left that did not come to their end; an import of the same name goes on with it. */
    fun leftovers(): List<File> = root.listFiles { file -> file.name.startsWith(".") && file.name.endsWith(PARTIAL) }.orEmpty().sortedBy { it.name }

    /** The name of the model that a leftover is the beginning of. */
    fun nameOf(leftover: File): String = leftover.name.removePrefix(".").removeSuffix(PARTIAL)

    fun removeLeftovers() = leftovers().forEach { it.deleteRecursively() }

    fun delete(bundle: File) {
        bundle.deleteRecursively()
    }

    /** The conversation that was on the screen last; null if there was none. */
    fun lastConversation(): String? = preferences.getString(CONVERSATION, null)

    fun rememberConversation(id: String) = preferences.edit().putString(CONVERSATION, id).apply()

    /** Unpack the model that comes with the app, unless it was unpacked before. */
    fun installDemo() {
        if (preferences.getBoolean(DEMO_INSTALLED, false)) return
        import(AssetSource(context, DEMO)) {}
        preferences.edit().putBoolean(DEMO_INSTALLED, true).apply()
    }

    /**
     * Copy a bundle and check the hash of every file. Where the source could not be read to its end, what was copied stays, and the next
     * import of that name goes on behind it. Of a copy that is not a whole bundle nothing is left.
     *
     * @param progress called after each block of bytes. It may throw to end the import.
     * @return the folder of the copy.
     * @throws GemmaException the source is not a bundle or is damaged, or a bundle of that name exists.
     * @throws IOException there is not enough space, or the source cannot be read.
     */
    fun import(source: Source, progress: (ImportStep) -> Unit): File = source.use {
        val target = File(root, source.name)
        if (!isInside(root, target)) throw BundleException("${source.name} is not a name for a folder")
        if (target.exists()) throw BundleException("there is already a model named ${source.name}; delete it first")
        val files = source.files()
        if (files.none { it.path == "manifest.json" }) {
            throw BundleException("${source.name} is not a bundle: it has no manifest.json; choose a folder that gemma-export made")
        }
        val partial = File(root, ".${source.name}$PARTIAL")
        try {
            copy(files, partial, progress)
            val bundle = Bundle.open(partial)
            bundle.checkHashes { done -> progress(ImportStep.Checking(percent(done, bundle.bytes))) }
            if (!partial.renameTo(target)) throw IOException("cannot write $target")
            target
        } catch (error: GemmaException) {
            partial.deleteRecursively()
            throw error
        } finally {
            if (partial.walk().none { it.isFile && it.length() > 0 }) partial.deleteRecursively()
        }
    }

    private fun copy(files: List<SourceFile>, folder: File, progress: (ImportStep) -> Unit) {
        folder.mkdirs()
        val targets = files.associateWith { File(folder, it.path) }
        targets.entries.firstOrNull { !isInside(folder, it.value) }?.let { throw BundleException("${it.key.path} lies outside the bundle") }
        val total = files.sumOf { it.bytes }
        var done = targets.entries.sumOf { (file, target) -> thereOf(file, target) }
        if (total - done > folder.usableSpace) {
            val free = folder.usableSpace shr 20
            throw IOException("the model needs ${(total - done) shr 20} MiB, but only $free MiB are free; make room on the device")
        }
        for ((file, target) in targets) copy(file, target) { read -> done += read; progress(ImportStep.Copying(percent(done, total))) }
    }

    /** How many bytes of a file are there already. */
    private fun thereOf(file: SourceFile, target: File): Long = target.length().takeIf { it <= file.bytes } ?: 0

    private fun copy(file: SourceFile, target: File, progress: (bytes: Int) -> Unit) {
        target.parentFile!!.mkdirs()
        var there = thereOf(file, target)
        if (target.isFile && there == file.bytes) return progress(0)
        val block = ByteArray(1 shl 20)
        FileOutputStream(target, there > 0).use { output ->
            file.open(there).use { input ->
                while (there < file.bytes) {
                    val read = input.read(block, 0, minOf(block.size.toLong(), file.bytes - there).toInt())
                    if (read < 0) throw EOFException("${file.path} ends after $there of ${file.bytes} bytes; import it again to go on")
                    output.write(block, 0, read)
                    there += read
                    progress(read)
                }
            }
        }
    }

    private fun isInside(folder: File, file: File) = file.canonicalPath.startsWith(folder.canonicalPath + File.separator)

    private fun percent(done: Long, total: Long) = (100 * done / maxOf(total, 1)).toInt()

    companion object {
        /** The name of the bundle in the APK's assets. */
        const val DEMO = "tiny-gemma2"
        private const val PARTIAL = ".partial"
        private const val SELECTED = "selected"
        private const val CONVERSATION = "conversation"
        private const val BACKEND = "backend of "
        private const val DEMO_INSTALLED = "demo_installed"
        private const val LAST_IMPORT = "last_import"
    }
}
