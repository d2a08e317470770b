package gemma.edge.litert

import gemma.edge.Adapter
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.Fixtures
import gemma.edge.GemmaRuntime
import gemma.edge.StateException
import gemma.edge.UnsupportedException
import gemma.edge.assertRefuses
import gemma.edge.engine.EngineTest
import gemma.edge.engine.StoredTensor
import gemma.edge.run
import gemma.edge.state.StateFile
import gemma.edge.state.StateHeader
import java.io.File
import java.nio.ByteBuffer
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
        val slots = Bundle.open(folder).backend("tflite").cache.layers.first().slots
        manifest.writeText(manifest.readText().replace("\"slots\": $slots", "\"slots\": ${slots - 1}"))
        assertRefuses<BundleException>("kv_cache_k_0", "$slots", "${slots - 1}") { open(folder) }
    }

    @Test
    fun a_bundle_for_a_gpu_runs_there_or_says_how_to_run_it_on_the_cpu() {
        val folder = damaged(model) { it }
        val manifest = File(folder, Bundle.MANIFEST)
        manifest.writeText(manifest.readText().replace("\"accelerator\": \"cpu\"", "\"accelerator\": \"gpu\""))
        val bundle = Bundle.open(folder)
        for (requested in listOf(null, "gpu")) {
            assertRefuses<UnsupportedException>("cannot run", "on a GPU of this device", "accelerator = \"cpu\"") {
                GemmaRuntime.open(bundle, "tflite", threads = 1, accelerator = requested)
            }
        }
        GemmaRuntime.open(bundle, "tflite", threads = 1, accelerator = "cpu").use { assertArrayEquals(model.logits(), it.run(model), 0f) }
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
    fun the_saved_cache_goes_on_and_its_tokens_are_not_fed() = open(model.bundle).use { runtime ->
        runtime.load(rewritten { tensor, bytes -> if (tensor.name == StateFile.IDS) bytes.also { it.putInt(0, 7).putInt(4, 9) } else bytes })
        assertArrayEquals(intArrayOf(7, 9), runtime.ids.copyOf(2))
        assertArrayEquals(model.logitsAfterState(), runtime.run(model, rest), 0f)
    }

    @Test
    fun a_state_without_a_cache_is_fed_again() = open(model.bundle).use { runtime ->
        runtime.load(rewritten(keep = { !it.name.startsWith("cache.") }))
        assertEquals(model.tokens.size - rest.count(), runtime.position)
        val expected = model.logitsFedAgain()
        assertArrayEquals(expected, runtime.run(model, rest).copyOf(expected.size), 0f)
    }

    @Test
    fun nothing_of_an_earlier_text_is_saved() {
        val files = List(2) { File(temporary.root, "state-$it") }
        for ((file, earlier) in files.zip(listOf(model.tokens, intArrayOf(2)))) open(model.bundle).use { runtime ->
            runtime.prefill(earlier)
            runtime.reset()
            runtime.run(model, 0 until model.stateCalls)
            runtime.save(file)
        }
        assertArrayEquals(files[0].readBytes(), files[1].readBytes())
    }

    @Test
    fun a_foreign_or_damaged_state_is_refused() = open(model.bundle).use { runtime ->
        runtime.prefill(intArrayOf(2, 3))
        val first = runtime.decode(5).copyOf()
        val key = "cache.kv_cache_k_0"
        val wrong = mapOf(
            "another bundle" to rewritten(header = { it.copy(identity = "0".repeat(64)) }),
            "$key is not what this bundle has" to rewritten(keep = { it.name != key }),
            "cache.kv_cache_held_9 is not" to rewritten(rename = { it.copy(name = it.name.replace("held_1", "held_9")) }),
            "it has 0 ids of ${model.pinned} pinned tokens" to rewritten(keep = { it.name != StateFile.FIRST }),
            "do not lead to position" to rewritten(header = { it.copy(position = 3) }),
            "its bytes were changed" to edited { it.also { bytes -> bytes[bytes.size - 1]++ } },
            "lies outside" to edited { it.copyOf(it.size - 1) },
        )
        for ((message, file) in wrong) {
            assertRefuses<StateException>(message) { runtime.load(file) }
            assertEquals(message, 3, runtime.position)
        }
        runtime.rewind(1)
        assertArrayEquals("nothing was changed", first, runtime.decode(5), 0f)
        val infinite = rewritten { tensor, bytes -> if (tensor.name == key) bytes.also { it.putFloat(0, Float.NaN) } else bytes }
        assertRefuses<StateException>("$key holds numbers that are not finite") { runtime.load(infinite) }
        assertEquals("the cache is unknown", 0, runtime.position)
        assertArrayEquals(model.logits(), runtime.run(model), 0f)
    }

    private val rest = model.stateCalls until model.calls.size

    /** Python's state, with another header, other tensors or other bytes, and with the hash that belongs to them. */
    private fun rewritten(
        header: (StateHeader) -> StateHeader = { it },
        keep: (StoredTensor) -> Boolean = { true },
        rename: (StoredTensor) -> StoredTensor = { it },
        change: (StoredTensor, ByteBuffer) -> ByteBuffer = { _, bytes -> bytes },
    ): File = File.createTempFile("state", null, temporary.root).also { file ->
        StateFile.open(model.state).use { state ->
            val originals = state.tensors.filter(keep).associateBy(rename)
            StateFile.write(file, header(state.header), originals.keys.toList()) { tensor ->
                listOf(originals.getValue(tensor).let { change(it, state.read(it)) })
            }
        }
    }

    /** Python's state with other bytes. */
    private fun edited(change: (ByteArray) -> ByteArray): File =
        File.createTempFile("state", null, temporary.root).also { it.writeBytes(change(model.state.readBytes())) }

    @Test
    fun adapters_are_refused_by_name() = open(model.bundle).use { runtime ->
        assertRefuses<UnsupportedException>("the tflite backend takes no adapters", "--lora") { runtime.useAdapter(Adapter.open(Fixtures.anAdapter)) }
        runtime.useAdapter(null)
    }

    @Test
    fun a_model_with_a_changed_byte_is_refused_or_runs() = damageEverywhere(model, bytes = 20_000)
}
