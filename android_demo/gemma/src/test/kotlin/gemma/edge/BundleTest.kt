package gemma.edge

import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class BundleTest {
    @get:Rule
    val temporary = TemporaryFolder()

    /** A copy of the demo's bundle, with a text in its manifest replaced. */
    private fun changed(old: String, new: String): File {
        val folder = Fixtures.copyOfDemo(temporary.newFolder())
        val manifest = File(folder, Bundle.MANIFEST)
        val text = manifest.readText()
        check(old in text) { "$old is not in the manifest" }
        manifest.writeText(text.replaceFirst(old, new))
        return folder
    }

    @Test
    fun reads_what_the_exporter_wrote() {
        val bundle = Bundle.open(Fixtures.demoBundle)
        assertEquals("tiny-gemma2", bundle.name)
        assertEquals(4096, bundle.vocabSize)
        assertEquals(setOf(1, 5), bundle.eosTokenIds)
        val backend = bundle.backends.single()
        assertEquals("onnx", backend.name)
        assertEquals(512, backend.cache.context)
        assertTrue(backend.cache.int8)
        assertTrue(backend.plan.residentBytes > backend.cache.bytes)
        assertEquals(listOf("genai.onnx", "generate.onnx", "model.onnx.data", "score.onnx"), backend.files.map { it.name }.sorted())
        val plan = Fixtures.json(File(Fixtures.demoBundle, Bundle.MANIFEST))["backends"]["onnx"]["plan"]
        assertEquals(plan["kv_bytes"].long, backend.cache.bytes)
    }

    @Test
    fun global_layers_keep_the_beginning_of_a_text_and_local_layers_do_not() {
        assertEquals(listOf(0, 128), Bundle.open(Fixtures.demoBundle).backends.single().cache.layers.take(2).map { it.pinned })
        assertRefuses<BundleException>("pinned") { Bundle.open(changed("\"pinned\": 0", "\"pinned\": 9")) }
        assertRefuses<BundleException>("pinned") { Bundle.open(changed("\"pinned\": 128", "\"pinned\": 9")) }
        assertRefuses<BundleException>("pinned") { Bundle.open(changed("\"pinned\": 128", "\"pinned\": 65537")) }
    }

    @Test
    fun every_byte_is_hashed_and_counted() {
        val bundle = Bundle.open(Fixtures.demoBundle)
        var last = 0L
        bundle.checkHashes { done -> assertTrue(done > last); last = done }
        assertEquals(bundle.bytes, last)
    }

    @Test
    fun a_changed_byte_is_found() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val weights = File(folder, "model.onnx.data")
        weights.writeBytes(weights.readBytes().also { it[4096] = (it[4096] + 1).toByte() })
        val bundle = Bundle.open(folder)
        assertRefuses<BundleException>("model.onnx.data was changed", "sha256") { bundle.checkHashes() }
    }

    @Test
    fun what_is_no_bundle_is_refused() {
        assertRefuses<BundleException>("not a bundle", "gemma-export") { Bundle.open(temporary.root) }
        File(temporary.root, Bundle.MANIFEST).writeText("{")
        assertRefuses<BundleException>("damaged") { Bundle.open(temporary.root) }
        File(temporary.root, Bundle.MANIFEST).writeText("[]")
        assertRefuses<BundleException>("damaged", "object") { Bundle.open(temporary.root) }
    }

    @Test
    fun another_schema_is_refused_by_number() {
        assertRefuses<BundleException>("schema_version 4", "reads 3") { Bundle.open(changed("\"schema_version\": 3", "\"schema_version\": 4")) }
    }

    @Test
    fun a_missing_key_and_a_wrong_type_are_named() {
        assertRefuses<BundleException>("'prefill_chunk'") { Bundle.open(changed("\"prefill_chunk\"", "\"chunk\"")) }
        assertRefuses<BundleException>("kv_heads") { Bundle.open(changed("\"kv_heads\": 4", "\"kv_heads\": \"x\"")) }
        assertRefuses<BundleException>("vocab_size") { Bundle.open(changed("\"vocab_size\": 4096", "\"vocab_size\": -1")) }
    }

    @Test
    fun a_backend_of_another_kind_is_named_and_a_cache_of_another_kind_is_refused() {
        val bundle = Bundle.open(changed("\"onnx\": {", "\"other\": {"))
        assertEquals(emptyList<Backend>(), bundle.backends)
        assertEquals(listOf("other"), bundle.backendNames)
        assertRefuses<UnsupportedException>("no 'onnx' backend", "other") { bundle.backend("onnx") }
        assertRefuses<UnsupportedException>("float8") { Bundle.open(changed("\"dtype\": \"int8\"", "\"dtype\": \"float8\"")) }
    }

    @Test
    fun a_truncated_file_is_refused_with_both_sizes() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val weights = File(folder, "model.onnx.data")
        val size = weights.length()
        weights.writeBytes(ByteArray(10))
        assertRefuses<BundleException>("model.onnx.data", "10 bytes", "$size") { Bundle.open(folder) }
        weights.delete()
        assertRefuses<BundleException>("model.onnx.data is missing") { Bundle.open(folder) }
    }

    @Test
    fun no_path_leads_out_of_the_bundle() {
        File(temporary.root, "secret").writeText("x")
        for (path in listOf("../secret", "/etc/passwd", "a/../../secret")) {
            val folder = changed("\"generate\": \"generate.onnx\"", "\"generate\": \"$path\"")
            assertRefuses<BundleException>("'$path', which is not in files") { Bundle.open(folder) }
        }
        val listed = changed("\"tokenizer.json\": {", "\"../secret\": {")
        assertRefuses<BundleException>("outside the bundle") { Bundle.open(listed) }
    }

    @Test
    fun a_link_out_of_the_bundle_is_refused() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val link = File(folder, "tokenizer.json")
        val outside = File(temporary.root, "elsewhere").also { link.copyTo(it) }
        link.delete()
        java.nio.file.Files.createSymbolicLink(link.toPath(), outside.toPath())
        assertRefuses<BundleException>("outside the bundle") { Bundle.open(folder) }
    }
}
