package gemma.edge

import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class BenchmarkTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private fun result(document: String): Node {
        val root = Node(JsonReader.parse(document.toByteArray()), "result")
        assertEquals(1L, root["schema_version"].long)
        return root["results"].list.single()
    }

    @Test
    fun every_repetition_and_every_token_is_there() {
        val settings = BenchmarkSettings(threads = 1, prefill = 20, decode = 7, repeat = 3, warmup = 2)
        val steps = ArrayList<Int>()
        val found = result(Benchmark().run(Fixtures.demoBundle, settings, steps::add))
        assertEquals((1..5).toList(), steps)
        assertEquals("", found["failure"].string)
        assertEquals("gemma-edge-android", found["tool"].string)
        assertEquals(mapOf("threads" to 1L, "prefill" to 20L, "decode" to 7L, "repeat" to 3L, "warmup" to 2L, "minutes" to 0.0), found["settings"].value)
        for (name in listOf("prefill_s", "ttft_s", "decode_s", "decode_at_s")) assertEquals(name, 3, found[name].list.size)
        val latencies = found["decode_ms"].list
        assertEquals(listOf(7, 7, 7), latencies.map { it.list.size })
        for (i in 0..2) {
            assertEquals(found["decode_s"].list[i].double * 1e3, latencies[i].list.sumOf { it.double }, 1e-6)
            assertTrue(found["ttft_s"].list[i].double >= found["prefill_s"].list[i].double)
        }
        assertTrue(found["memory"]["peak_mib"].double >= found["memory"]["end_mib"].double)
    }

    @Test
    fun a_result_names_the_library_its_version_the_abi_and_what_the_processor_can_do() {
        val settings = BenchmarkSettings(prefill = 5, decode = 2, repeat = 1, warmup = 0, backend = "onnx")
        val found = result(Benchmark().run(Fixtures.demoBundle, settings))
        assertEquals("onnx", found["model"]["backend"].string)
        assertTrue(Regex("\\d+\\.\\d+\\.\\d+").matches(found["versions"]["onnxruntime"].string))
        assertTrue(found["device"]["abi"].string in listOf("x86_64", "arm64-v8a"))
        assertEquals(BenchmarkSystem.flagsIn(File("/proc/cpuinfo").readText()), found["device"]["flags"].list.map { it.string })
        val arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nprocessor\t: 1\nFeatures\t: fp sve\n"
        assertEquals(listOf("asimddp", "i8mm"), BenchmarkSystem.flagsIn(arm))
        assertEquals(listOf("avx2", "avx512f"), BenchmarkSystem.flagsIn("flags\t\t: fpu avx2 avx512f\n"))
        assertEquals(emptyList<String>(), BenchmarkSystem.flagsIn(""))
    }

    @Test
    fun bytes_read_per_token_are_the_weights_and_what_the_windows_see() {
        val found = result(Benchmark().run(Fixtures.demoBundle, BenchmarkSettings(prefill = 150, decode = 10, repeat = 1, warmup = 0)))
        // keys and values in int8, 4 heads of 64; three layers see 128 tokens, the other three see all 155
        val cache = 2L * 4 * 64 * (3 * 128 + 3 * 155)
        assertEquals(File(Fixtures.demoBundle, "model.onnx.data").length() + cache, found["model"]["read_bytes_per_token"].long)
    }

    @Test
    fun what_cannot_be_measured_is_a_result_with_its_reason() {
        val found = result(Benchmark().run(temporary.root, BenchmarkSettings()))
        assertTrue("not a bundle" in found["failure"].string)
        assertEquals(temporary.root.name, found["model"]["name"].string)
    }

    @Test
    fun settings_that_measure_nothing_are_refused() {
        assertRefuses<InputException>("repeat 0") { BenchmarkSettings(repeat = 0) }
        assertRefuses<InputException>("minutes NaN") { BenchmarkSettings(minutes = Double.NaN) }
    }

    @Test
    fun json_that_is_written_is_read_again() {
        val value = mapOf("a" to listOf(1L, 2.5, null, true), "\"\\\n\u0001" to "é🙂", "e" to emptyList<Any>())
        assertEquals(value, JsonReader.parse(toJson(value).toByteArray()))
    }
}
