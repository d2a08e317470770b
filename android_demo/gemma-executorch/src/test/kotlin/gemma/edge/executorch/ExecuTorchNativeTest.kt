package gemma.edge.executorch

import gemma.edge.Adapter
import gemma.edge.BundleException
import gemma.edge.Fixtures
import gemma.edge.UnsupportedException
import gemma.edge.assertRefuses
import gemma.edge.engine.EngineTest
import gemma.edge.engine.StoredTensor
import org.junit.Test

/** ExecuTorch's own Android library on the JVM; `make android-native-test` runs it. */
class ExecuTorchNativeTest : EngineTest("executorch") {
    private val model = Fixtures.models.first()

    /** Java cannot reach the caches of the program. */
    override fun notSaved(tensors: List<StoredTensor>): Set<StoredTensor> = tensors.filter { it.name.startsWith("cache.") }.toSet()

    @Test
    fun a_program_that_would_end_the_process_is_refused() {
        assertRefuses<BundleException>("bytes, the manifest says") { open(damaged(model) { it.copyOf(it.size / 2) }) }
        assertRefuses<BundleException>("is not an ExecuTorch program") { open(damaged(model) { bytes -> bytes.also { it[4] = 0 } }) }
        assertRefuses<BundleException>("header does not fit") { open(damaged(model) { bytes -> bytes.also { it[20] = 0x7f } }) }
    }

    @Test
    fun adapters_are_refused_by_name() = open(model.bundle).use { runtime ->
        assertRefuses<UnsupportedException>("the executorch backend takes no adapters", "--lora") { runtime.useAdapter(Adapter.open(Fixtures.anAdapter)) }
        runtime.useAdapter(null)
    }

    @Test
    fun a_program_with_a_changed_byte_is_refused_or_runs() = damageEverywhere(model, bytes = 20_000)
}
