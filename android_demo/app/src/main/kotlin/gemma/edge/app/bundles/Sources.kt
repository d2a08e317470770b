package gemma.edge.app.bundles

import android.content.Context
import android.net.Uri
import androidx.documentfile.provider.DocumentFile
import java.io.EOFException
import java.io.FileInputStream
import java.io.FileNotFoundException
import java.io.IOException
import java.io.InputStream

/** What a model is imported from. */
interface Source : AutoCloseable {
    /** The name of the model. */
    val name: String

    /** All files in the folder and its subfolders. */
    fun files(): List<SourceFile>

    override fun close() = Unit
}

/** One file of a [Source]. Its [path] is relative to the source and written with slashes; [open] gives its bytes from a place on. */
class SourceFile(val path: String, val bytes: Long, val open: (from: Long) -> InputStream)

/** Pass over the first bytes of a stream. */
fun InputStream.behind(bytes: Long): InputStream = also {
    var left = bytes
    while (left > 0) {
        val passed = skip(left)
        if (passed > 0) left -= passed else if (read() >= 0) left-- else throw EOFException("the file became shorter by $left bytes")
    }
}

/** A folder in the APK's assets. */
class AssetSource(private val context: Context, override val name: String) : Source {
    override fun files(): List<SourceFile> = context.assets.list(name).orEmpty().map { file ->
        val path = "$name/$file"
        // openFd cannot tell the size of an asset that is compressed in the APK
        SourceFile(file, context.assets.open(path).use { it.available().toLong() }) { from -> context.assets.open(path).behind(from) }
    }
}

/** A folder that the user chose in the system's file picker. */
class TreeSource(private val context: Context, tree: Uri) : Source {
    private val root = DocumentFile.fromTreeUri(context, tree) ?: throw FileNotFoundException("$tree is not a folder")
    override val name: String = root.name ?: "model"

    override fun files(): List<SourceFile> = below(root, "")

    private fun below(folder: DocumentFile, prefix: String): List<SourceFile> = folder.listFiles().flatMap { file ->
        val path = prefix + (file.name ?: return@flatMap emptyList())
        if (file.isDirectory) {
            below(file, "$path/")
        } else {
            listOf(SourceFile(path, file.length()) { from -> open(file, path).behind(from) })
        }
    }

    private fun open(file: DocumentFile, path: String): InputStream =
        permitted(path) { context.contentResolver.openInputStream(file.uri) } ?: throw FileNotFoundException(path)
}

/** A zip that the user chose in the system's file picker. */
fun zipSource(context: Context, file: Uri): Source {
    val opened = permitted("$file") { context.contentResolver.openFileDescriptor(file, "r") } ?: throw FileNotFoundException("$file cannot be read")
    val name = DocumentFile.fromSingleUri(context, file)?.name ?: "model"
    return ZipSource(name.removeSuffix(".zip"), FileInputStream(opened.fileDescriptor).channel) { opened.close() }
}

/** Open what the user chose; the permission for it may have ended with an earlier process. */
private inline fun <T> permitted(what: String, open: () -> T): T = try {
    open()
} catch (error: SecurityException) {
    throw IOException("the app may not read $what any more; choose it again", error)
}
