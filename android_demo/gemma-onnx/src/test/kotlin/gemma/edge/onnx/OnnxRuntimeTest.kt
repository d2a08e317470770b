package gemma.edge.onnx

import ai.onnxruntime.OrtEnvironment
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.Fixtures
import gemma.edge.GemmaRuntime
import gemma.edge.InputException
import gemma.edge.UnsupportedException
import gemma.edge.assertRefuses
import gemma.edge.engine.EngineTest
import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Test

class OnnxRuntimeTest : EngineTest("onnx") {
    @Test
    fun the_fixtures_were_made_with_this_version() {
        assertEquals("1.29.0", OrtEnvironment.getEnvironment().version)
    }

    @Test
    fun the_engine_on_the_class_path_is_taken() {
        assertEquals(listOf("onnx"), GemmaRuntime.available())
        GemmaRuntime.open(Bundle.open(Fixtures.demoBundle), threads = 1).use { runtime ->
            assertEquals("onnx", runtime.backend.name)
            assertEquals("onnxruntime 1.29.0", "${runtime.library.name} ${runtime.library.version}")
        }
        assertRefuses<InputException>("threads 0") { GemmaRuntime.open(Bundle.open(Fixtures.demoBundle), threads = 0) }
    }

    @Test
    fun a_bundle_for_a_gpu_is_refused_by_name() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val manifest = File(folder, Bundle.MANIFEST)
        val text = manifest.readText()
        manifest.writeText(text.replace("\"accelerator\": \"cpu\"", "\"accelerator\": \"gpu\""))
        assertEquals("gpu", Bundle.open(folder).backend("onnx").accelerator)
        assertRefuses<UnsupportedException>("onnx backend", "accelerator gpu", "--accelerator") { open(folder) }
        manifest.writeText(text.replace("\"accelerator\": \"cpu\"", "\"accelerator\": \"npu\""))
        assertRefuses<BundleException>("accelerator is not one of cpu, gpu") { Bundle.open(folder) }
        manifest.writeText(text)
        assertRefuses<UnsupportedException>("made for the accelerator cpu, not for gpu", "--accelerator gpu") {
            GemmaRuntime.open(Bundle.open(folder), accelerator = "gpu")
        }
    }

    @Test
    fun a_graph_with_a_changed_byte_is_refused_or_runs() = damageEverywhere(Fixtures.models.first(), bytes = 20_000)

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
