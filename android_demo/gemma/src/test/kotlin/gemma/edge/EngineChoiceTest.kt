package gemma.edge

import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

/** The choice of an engine in an app that has none; the modules with engines test the rest. */
class EngineChoiceTest {
    @get:Rule
    val temporary = TemporaryFolder()

    @Test
    fun a_missing_engine_is_named_with_the_dependency_to_add() {
        val bundle = Bundle.open(Fixtures.demoBundle)
        assertEquals(emptyList<String>(), GemmaRuntime.available())
        assertRefuses<UnsupportedException>("holds onnx", "gemma.edge:gemma-onnx:0.1.0 for onnx") { GemmaRuntime.open(bundle) }
        assertRefuses<UnsupportedException>("gemma.edge:gemma-onnx:0.1.0") { GemmaRuntime.open(bundle, "onnx") }
    }

    @Test
    fun a_backend_that_is_not_in_the_bundle_is_named_with_those_that_are() {
        val bundle = Bundle.open(Fixtures.demoBundle)
        assertRefuses<UnsupportedException>("no 'tflite' backend", "only onnx", "--backend tflite") { GemmaRuntime.open(bundle, "tflite") }
    }

    @Test
    fun a_backend_of_another_library_is_refused_with_those_that_run_here() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val manifest = File(folder, Bundle.MANIFEST)
        manifest.writeText(manifest.readText().replace("\"onnx\": {", "\"other\": {"))
        for (requested in listOf(null, "other")) {
            assertRefuses<UnsupportedException>("holds other", "runs executorch, tflite, onnx") {
                GemmaRuntime.open(Bundle.open(folder), requested)
            }
        }
    }
}
