package gemma.edge.litert

import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.Fixtures
import gemma.edge.assertRefuses
import gemma.edge.engine.EngineTest
import gemma.edge.run
import java.io.File
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNotEquals
import org.junit.Test

/** LiteRT's own Android library on the JVM; `make android-native-test` runs it. */
class LiteRtNativeTest : EngineTest("tflite") {
    private val model = Fixtures.models.first()

    @Test
    fun a_model_that_would_end_the_process_is_refused() {
        assertRefuses<BundleException>("bytes, the manifest says") { open(damaged(model) { it.copyOf(it.size / 2) }) }
        assertRefuses<BundleException>("not a TFLite model") { open(damaged(model) { bytes -> bytes.also { it[4] = 0 } }) }
        val folder = damaged(model) { it }
        val manifest = File(folder, Bundle.MANIFEST)
        val slots = Bundle.open(folder).backend("tflite").cache.slots.first()
        manifest.writeText(manifest.readText().replace("\"slots\": $slots", "\"slots\": ${slots - 1}"))
        assertRefuses<BundleException>("kv_cache_k_0", "$slots", "${slots - 1}") { open(folder) }
    }

    @Test
    fun packed_weights_are_kept_and_damaged_ones_are_made_again() {
        val cacheDir = temporary.newFolder()
        val kept = { cacheDir.walk().filter { it.isFile }.single() }
        open(model.bundle, cacheDir).use { assertArrayEquals(model.logits(), it.run(model), 0f) }
        val first = kept()
        assertEquals("weights-${gemma.edge.engine.hashOf(first)}", first.name)
        val time = first.lastModified().also { first.setLastModified(it - 10_000) }
        open(model.bundle, cacheDir).use { assertArrayEquals(model.logits(), it.run(model), 0f) }
        assertEquals("it was not written again", time - 10_000, kept().lastModified())
        first.writeBytes(first.readBytes().also { it[it.size - 100]++ })
        File(cacheDir, "gemma-packed/foreign").mkdirs()
        open(model.bundle, cacheDir).use { assertArrayEquals(model.logits(), it.run(model), 0f) }
        assertNotEquals("it was written again", time - 10_000, kept().lastModified())
        assertEquals(1, File(cacheDir, "gemma-packed").list()!!.size)
    }

    @Test
    fun a_model_with_a_changed_byte_is_refused_or_runs() = damageEverywhere(model, bytes = 20_000)
}
