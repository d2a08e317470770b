package gemma.edge.app

import android.content.Context
import android.net.Uri
import androidx.documentfile.provider.DocumentFile
import java.io.FileNotFoundException
import java.io.InputStream

/** A folder in the APK's assets. */
class AssetSource(private val context: Context, override val name: String) : Source {
    override fun files(): List<SourceFile> = context.assets.list(name).orEmpty().map { file ->
        val path = "$name/$file"
        // openFd cannot tell the size of an asset that is compressed in the APK
        SourceFile(file, context.assets.open(path).use { it.available().toLong() }) { context.assets.open(path) }
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
            listOf(SourceFile(path, file.length()) { open(file, path) })
        }
    }

    private fun open(file: DocumentFile, path: String): InputStream =
        context.contentResolver.openInputStream(file.uri) ?: throw FileNotFoundException(path)
}
