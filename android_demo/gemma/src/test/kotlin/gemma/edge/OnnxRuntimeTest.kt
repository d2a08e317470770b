package gemma.edge

import ai.onnxruntime.OrtEnvironment
import java.io.File
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class OnnxRuntimeTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private fun open(folder: File) = OnnxRuntime.open(Bundle.open(folder), threads = 1)

    @Test
    fun logits_are_pythons_bit_for_bit_past_the_end_of_the_context() {
        assertEquals("the version with which the fixtures were made", "1.29.0", OrtEnvironment.getEnvironment().version)
        for (model in Fixtures.models) {
            open(model.bundle).use { runtime ->
                check(model.tokens.size > runtime.bundle.cache.context)
                assertArrayEquals(model.name, model.logits(), runtime.run(model), 0f)
                assertEquals(model.tokens.size, runtime.position)
            }
        }
    }

    @Test
    fun after_a_reset_everything_is_as_at_first() {
        val model = Fixtures.models.first { it.name == "random" }
        open(model.bundle).use { runtime ->
            val first = runtime.run(model)
            runtime.reset()
            assertEquals(0, runtime.position)
            assertArrayEquals(first, runtime.run(model), 0f)
        }
    }

    @Test
    fun tokens_that_cannot_be_fed_are_refused_and_change_nothing() {
        open(Fixtures.demoBundle).use { runtime ->
            assertRefuses<InputException>("no token") { runtime.prefill(IntArray(0)) }
            assertRefuses<InputException>("4096", "vocabulary") { runtime.prefill(intArrayOf(2, 4096)) }
            assertRefuses<InputException>("-1") { runtime.decode(-1) }
            assertEquals(0, runtime.position)
        }
        assertRefuses<InputException>("threads 0") { OnnxRuntime.open(Bundle.open(Fixtures.demoBundle), threads = 0) }
    }

    @Test
    fun a_closed_runtime_is_refused_and_closing_twice_is_not() {
        val runtime = open(Fixtures.demoBundle)
        runtime.decode(2)
        runtime.close()
        runtime.close()
        assertRefuses<IllegalStateException>("closed") { runtime.decode(2) }
    }

    @Test
    fun a_graph_that_is_damaged_or_of_another_bundle_is_refused() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val graph = File(folder, "generate.onnx")
        val bytes = graph.readBytes()
        graph.writeBytes(ByteArray(bytes.size))
        assertRefuses<BundleException>("generate.onnx is damaged") { open(folder) }
        graph.writeBytes(bytes)
        val manifest = File(folder, Bundle.MANIFEST)
        manifest.writeText(manifest.readText().replace("\"slots\": 255", "\"slots\": 256"))
        assertRefuses<BundleException>("past_key_values.0.key", "255", "256") { open(folder) }
    }
}
