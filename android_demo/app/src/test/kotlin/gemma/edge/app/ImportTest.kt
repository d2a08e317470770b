package gemma.edge.app

import android.content.Intent
import gemma.edge.BundleException
import gemma.edge.GemmaException
import gemma.edge.InputException
import gemma.edge.app.bundles.BundleStore
import gemma.edge.app.bundles.HttpSource
import gemma.edge.app.bundles.ImportRequest
import gemma.edge.app.bundles.ImportService
import gemma.edge.app.bundles.ImportState
import gemma.edge.app.bundles.ImportStep
import gemma.edge.app.bundles.Source
import gemma.edge.app.bundles.SourceFile
import gemma.edge.app.bundles.behind
import gemma.edge.app.bundles.ZipSource
import java.io.File
import java.io.FileInputStream
import java.io.IOException
import java.io.InputStream
import java.net.ServerSocket
import java.util.zip.CRC32
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream
import java.util.concurrent.CountDownLatch
import java.util.concurrent.atomic.AtomicLong
import kotlin.concurrent.thread
import kotlin.random.Random
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.annotation.Config

/** Models from zips and servers, and imports that do not come to their end. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [35])
class ImportTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val application = RuntimeEnvironment.getApplication() as GemmaApplication
    private val store = BundleStore(application)
    private val bundles = File(application.filesDir, "bundles")
    private val files = demoBundle.walk().filter { it.isFile }.map { it.relativeTo(demoBundle).path }.sorted().toList()

    private fun assertImported(folder: File) {
        for (name in files) assertArrayEquals(name, File(demoBundle, name).readBytes(), File(folder, name).readBytes())
        assertEquals(emptyList<File>(), store.leftovers())
    }

    private fun zip(prefix: String, stored: Boolean): File = temporary.newFile().also { file ->
        ZipOutputStream(file.outputStream()).use { zip ->
            zip.setComment("a comment that contains PK\u0005\u0006")
            zip.putNextEntry(ZipEntry("other/notes.txt"))
            for (name in files) {
                val bytes = File(demoBundle, name).readBytes()
                val entry = ZipEntry(prefix + name)
                if (stored) entry.apply { method = ZipEntry.STORED; size = bytes.size.toLong(); crc = CRC32().apply { update(bytes) }.value }
                zip.putNextEntry(entry)
                zip.write(bytes)
            }
        }
    }

    private fun source(zip: File, name: String = "zipped") = ZipSource(name, FileInputStream(zip).channel)

    @Test
    fun a_zip_is_imported_wherever_the_bundle_lies_in_it() {
        assertImported(store.import(source(zip("", stored = false), "a")) {})
        assertImported(store.import(source(zip("models/demo/", stored = true), "b")) {})
    }

    @Test
    fun a_file_of_a_zip_is_read_from_any_place_on() {
        for (stored in listOf(true, false)) source(zip("", stored)).use { source ->
            val file = source.files().first { it.path == "tokenizer.json" }
            val expected = File(demoBundle, file.path).readBytes()
            assertEquals(expected.size.toLong(), file.bytes)
            for (from in listOf(0, 1, 5000, expected.size)) {
                assertArrayEquals(expected.copyOfRange(from, expected.size), file.open(from.toLong()).use { it.readBytes() })
            }
        }
    }

    @Test
    fun a_damaged_zip_is_refused_and_leaves_nothing() {
        val whole = zip("", stored = false).readBytes()
        val random = Random(0)
        var refused = 0
        repeat(DAMAGES) { number ->
            val bytes = whole.copyOf()
            // most of the damage goes into the directory at the end
            repeat(3) { bytes[bytes.size - 1 - random.nextInt(if (number % 4 == 0) bytes.size else 1500)] = random.nextInt().toByte() }
            val file = temporary.newFile().also { it.writeBytes(bytes) }
            try {
                store.import(source(file, "damaged$number")) {}.deleteRecursively()
            } catch (_: GemmaException) {
                refused++
            } catch (_: IOException) {
                refused++
            }
            file.delete()
            store.removeLeftovers()
        }
        println("$DAMAGES damaged zips, $refused refused")
        assertTrue("$refused", refused > DAMAGES / 4)
        assertThrows(BundleException::class.java) { store.import(source(temporary.newFile())) {} }
        assertEquals(emptyList<String>(), bundles.list().orEmpty().toList())
    }

    /** The demo's bundle, whose reading breaks off after so many bytes of the largest file. */
    private inner class Breaking(private val after: Long) : Source {
        var read = 0L
        override val name = "resumed"
        override fun files() = files.map { path ->
            SourceFile(path, File(demoBundle, path).length()) { from -> Counted(File(demoBundle, path).inputStream().behind(from)) }
        }

        private inner class Counted(private val input: InputStream) : InputStream() {
            override fun read() = throw UnsupportedOperationException()
            override fun read(bytes: ByteArray, offset: Int, length: Int): Int {
                if (read >= after) throw IOException("unplugged")
                return input.read(bytes, offset, minOf(length, 10_000)).also { read += it }
            }
        }
    }

    @Test
    fun an_import_that_broke_off_goes_on_where_it_was() {
        val total = files.sumOf { File(demoBundle, it).length() }
        assertThrows(IOException::class.java) { store.import(Breaking(total / 2)) {} }
        assertEquals(listOf(".resumed.partial"), store.leftovers().map { it.name })
        assertEquals(emptyList<File>(), store.list())
        val steps = ArrayList<Int>()
        val second = Breaking(Long.MAX_VALUE)
        assertImported(store.import(second) { if (it is ImportStep.Copying) steps += it.percent })
        assertTrue("${second.read} of $total", second.read < total * 0.6)
        assertTrue("$steps", steps.first() >= 45 && steps.last() == 100)
    }

    @Test
    fun what_was_left_of_another_bundle_is_noticed_and_what_is_left_can_be_removed() {
        assertThrows(IOException::class.java) { store.import(Breaking(1_000_000)) {} }
        val largest = store.leftovers().single().walk().maxBy { it.length() }
        largest.writeBytes(largest.readBytes().also { it[7]++ })
        assertThrows(BundleException::class.java) { store.import(Breaking(Long.MAX_VALUE)) {} }
        assertEquals("nothing is left of a wrong copy", emptyList<File>(), store.leftovers())
        assertThrows(IOException::class.java) { store.import(Breaking(1_000_000)) {} }
        store.removeLeftovers()
        assertEquals(emptyList<String>(), bundles.list().orEmpty().toList())
    }

    /** A server of the demo's bundle; it breaks off each answer after so many bytes, when [mayBreak] is open. */
    private inner class Server(private val ranges: Boolean, private val most: Int) : AutoCloseable {
        @Volatile
        var mayBreak = CountDownLatch(0)
        private val socket = ServerSocket(0)
        val sent = AtomicLong()
        val address = "http://127.0.0.1:${socket.localPort}/models/demo"

        init {
            thread(isDaemon = true) { while (!socket.isClosed) runCatching { socket.accept().use(::answer) } }
        }

        private fun answer(client: java.net.Socket) {
            val lines = client.getInputStream().bufferedReader().let { reader -> generateSequence { reader.readLine() }.takeWhile { it.isNotEmpty() }.toList() }
            val file = File(demoBundle, lines[0].split(' ')[1].removePrefix("/models/demo/"))
            val out = client.getOutputStream()
            if (!file.isFile) return out.write("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".toByteArray())
            val range = lines.firstOrNull { it.startsWith("Range: bytes=") }?.substringAfter('=')?.removeSuffix("-")?.toInt()
            val from = if (ranges) range ?: 0 else 0
            val bytes = file.readBytes().let { it.copyOfRange(from, it.size) }
            val status = if (from > 0) "206 Partial Content" else "200 OK"
            out.write("HTTP/1.1 $status\r\nContent-Length: ${bytes.size}\r\nConnection: close\r\n\r\n".toByteArray())
            out.write(bytes, 0, minOf(most, bytes.size))
            sent.addAndGet(minOf(most, bytes.size).toLong())
            if (most < bytes.size) mayBreak.await()
        }

        override fun close() = socket.close()
    }

    @Test
    fun a_download_that_breaks_off_goes_on_and_its_hashes_are_checked() {
        val total = files.sumOf { File(demoBundle, it).length() }
        Server(ranges = true, most = 2_000_000).use { server ->
            var tries = 0
            while (store.list().isEmpty() && tries < 20) {
                tries++
                try {
                    store.import(HttpSource.of("${server.address}/")) {}
                } catch (_: IOException) {
                    assertEquals(1, store.leftovers().size)
                }
            }
            assertImported(store.list().single())
            assertEquals("demo", store.list().single().name)
            val manifests = tries * File(demoBundle, "manifest.json").length()
            assertTrue("${server.sent.get()} bytes in $tries tries", tries > 1 && server.sent.get() <= total + manifests)
        }
    }

    @Test
    fun a_server_without_ranges_sends_everything_again_and_one_without_a_bundle_is_named() {
        assertThrows(IOException::class.java) { store.import(Breaking(4_000_000)) {} }
        store.leftovers().single().renameTo(File(bundles, ".demo.partial"))
        Server(ranges = false, most = Int.MAX_VALUE).use { server ->
            assertImported(store.import(HttpSource.of(server.address + "/manifest.json")) {})
            val error = assertThrows(IOException::class.java) { store.import(HttpSource.of(server.address.replace("demo", "none"))) {} }
            assertTrue("${error.message}", "404" in error.message!!)
        }
        for (text in listOf("", "example.org", "ftp://example.org/a", "https://", "http://a b/")) {
            assertThrows(text, InputException::class.java) { HttpSource.of(text) }
        }
    }

    /** The service that the app has just asked Android to start. */
    private fun startedService(): ImportService =
        Robolectric.buildService(ImportService::class.java, shadowOf(application).nextStartedService).create().startCommand(0, 1).get()

    private fun ImportService.title() = shadowOf(shadowOf(this).lastForegroundNotification).contentTitle.toString()

    @Test
    fun a_service_imports_and_shows_how_far_it_is_and_what_was_stopped_goes_on() {
        Server(ranges = true, most = 2_000_000).use { server ->
            server.mayBreak = CountDownLatch(1)
            val models = ModelsViewModel(application)
            val request = ImportRequest(ImportRequest.Kind.DOWNLOAD, server.address)
            models.import(request)
            val first = startedService()
            waitUntil("a part is there") { Regex("Copying demo: [1-9].*").matches(first.title()) }
            models.import(request)
            assertEquals("one import at a time", null, shadowOf(application).nextStartedService)
            first.onStartCommand(Intent(application, ImportService::class.java), 0, 2)
            server.mayBreak.countDown()
            waitUntil("it has stopped") { shadowOf(first).isStoppedBySelf && shadowOf(first).isForegroundStopped }
            waitUntil("it is said what is left") { models.state.value.leftovers == listOf("demo") }
            assertEquals(ImportState.Idle, models.state.value.import)
            assertEquals(request, ModelsViewModel(application).let { waitUntil("it is read") { it.state.value.last != null }; it.state.value.last })
        }
        Server(ranges = true, most = Int.MAX_VALUE).use { server ->
            ModelsViewModel(application).import(ImportRequest(ImportRequest.Kind.DOWNLOAD, server.address))
            val second = startedService()
            waitUntil("it is imported") { shadowOf(second).isStoppedBySelf }
            assertImported(store.selected()!!)
            val total = files.sumOf { File(demoBundle, it).length() }
            assertTrue("${server.sent.get()} of $total", server.sent.get() < total)
        }
    }

    @Test
    fun what_the_app_may_not_read_any_more_is_named() {
        val gone = ImportRequest(ImportRequest.Kind.ZIP, "content://nowhere/model.zip")
        runBlocking { application.imports.run { gone.open(application) } }
        val state = application.imports.state.value
        assertTrue("$state", state is ImportState.Failed && "content://nowhere/model.zip" in state.reason)
    }

    private companion object {
        const val DAMAGES = 40
    }
}
