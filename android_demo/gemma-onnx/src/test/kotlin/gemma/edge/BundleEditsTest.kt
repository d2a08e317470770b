package gemma.edge

import java.io.File
import java.math.BigInteger
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

/** Every key of a manifest gets a wrong type, goes missing, becomes negative, huge and null; tests/bundle/test_manifest_edits.py does so in Python. */
class BundleEditsTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val manifest = JsonReader.parse(File(Fixtures.demoBundle, Bundle.MANIFEST).readBytes())

    /** The ways to every key, from the outside in; indices are Int. */
    private fun paths(value: Any?): List<List<Any>> = when (value) {
        is Map<*, *> -> value.entries.flatMap { (key, inner) -> below(key as String, inner) }
        is List<*> -> value.withIndex().flatMap { (index, inner) -> below(index, inner) }
        else -> emptyList()
    }

    private fun below(key: Any, inner: Any?) = listOf(listOf(key)) + paths(inner).map { listOf(key) + it }

    /** A copy with something else at a path; [MISSING] removes what stands there. */
    private fun edited(value: Any?, path: List<Any>, to: Any?): Any? {
        val key = path.firstOrNull() ?: return to
        val gone = path.size == 1 && to === MISSING
        return when (value) {
            is Map<*, *> -> value.filterKeys { !gone || it != key }.mapValues { (name, inner) -> if (name == key) edited(inner, path.drop(1), to) else inner }
            is List<*> -> value.withIndex().filter { !gone || it.index != key }.map { (index, inner) -> if (index == key) edited(inner, path.drop(1), to) else inner }
            else -> error("nothing at $path")
        }
    }

    @Test
    fun every_edit_opens_or_is_refused_in_one_line() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val kinds = listOf(MISSING, -5L, BigInteger.TEN.pow(30), null, "x", emptyList<Any>(), mapOf("an" to "object"), 0.5)
        var refused = 0
        var accepted = 0
        for (path in paths(manifest)) for (to in kinds) {
            File(folder, Bundle.MANIFEST).writeText(toJson(edited(manifest, path, to)))
            try {
                val bundle = Bundle.open(folder)
                if (accepted++ % RUNS_ONE_IN == 0) GemmaRuntime.open(bundle, threads = 1).use { it.prefill(intArrayOf(2, 3)) }
            } catch (error: GemmaException) {
                refused++
                assertTrue("$path to $to: ${error.message}", '\n' !in error.message.orEmpty())
            }
        }
        println("${refused + accepted} tried, $refused refused, $accepted accepted, 0 other exceptions")
        assertTrue("$refused refused", refused > 300)
    }

    private companion object {
        val MISSING = Any()
        const val RUNS_ONE_IN = 50 // of the edits that are accepted
    }
}
