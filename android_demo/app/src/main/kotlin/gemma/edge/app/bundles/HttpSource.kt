package gemma.edge.app.bundles

import gemma.edge.BundleException
import gemma.edge.InputException
import java.io.ByteArrayInputStream
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.URI
import java.net.URISyntaxException
import org.json.JSONException
import org.json.JSONObject

/** A bundle's folder on a server. The manifest names the files; a download that was interrupted goes on where it was. */
class HttpSource private constructor(private val base: URI) : Source {
    override val name: String = base.path.trimEnd('/').substringAfterLast('/').ifEmpty { base.host }

    override fun files(): List<SourceFile> {
        val manifest = open(MANIFEST, 0).use { it.readAtMost(MAX_MANIFEST_BYTES) }
        val files = try {
            JSONObject(manifest.decodeToString()).getJSONObject("files").let { all -> all.keys().asSequence().map { it to all.getJSONObject(it).getLong("bytes") }.toList() }
        } catch (error: JSONException) {
            throw BundleException("$base has no manifest of a bundle (${error.message}); give the address of a bundle's folder", error)
        }
        val others = files.map { (path, bytes) -> SourceFile(path, bytes) { from -> open(path, from) } }
        return others + SourceFile(MANIFEST, manifest.size.toLong()) { from -> ByteArrayInputStream(manifest).behind(from) }
    }

    private fun open(path: String, from: Long): InputStream {
        val address = URI(base.scheme, base.authority, "${base.path.trimEnd('/')}/$path", null, null).toURL()
        val connection = address.openConnection() as HttpURLConnection
        connection.connectTimeout = CONNECT_MS
        connection.readTimeout = READ_MS
        connection.setRequestProperty("Accept-Encoding", "identity")
        if (from > 0) connection.setRequestProperty("Range", "bytes=$from-")
        return when (val status = connection.responseCode) {
            HttpURLConnection.HTTP_PARTIAL -> connection.inputStream
            HttpURLConnection.HTTP_OK -> connection.inputStream.behind(from) // the server knows no ranges
            else -> throw IOException("$address cannot be read: the server answers $status; check the address")
        }
    }

    private fun InputStream.readAtMost(bytes: Int): ByteArray {
        val block = ByteArray(1 shl 16)
        val all = java.io.ByteArrayOutputStream()
        while (true) {
            val read = read(block)
            if (read < 0) return all.toByteArray()
            all.write(block, 0, read)
            if (all.size() > bytes) throw BundleException("$base/$MANIFEST is larger than $bytes bytes; give the address of a bundle's folder")
        }
    }

    companion object {
        private const val MANIFEST = "manifest.json"
        private const val MAX_MANIFEST_BYTES = 64 shl 20
        private const val CONNECT_MS = 15_000
        private const val READ_MS = 30_000

        /**
         * The bundle at an address, of its folder or its manifest.
         *
         * @throws InputException the text is not an address that begins with https:// or http://.
         */
        fun of(text: String): HttpSource {
            val address = text.trim().removeSuffix(MANIFEST)
            val uri = try {
                URI(address)
            } catch (error: URISyntaxException) {
                throw InputException("'$text' is not an address (${error.reason}); it looks like https://example.org/models/gemma")
            }
            if (uri.scheme !in listOf("https", "http") || uri.host == null) {
                throw InputException("'$text' is not an address; it looks like https://example.org/models/gemma")
            }
            return HttpSource(uri)
        }
    }
}
