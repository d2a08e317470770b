package gemma.edge.litert

import com.google.ai.edge.litert.CompiledModel.GpuOptions.Precision
import org.junit.Assert.assertEquals
import org.junit.Test

class PrecisionTest {
    @Test
    fun a_gpu_computes_in_float32() {
        val options = inFloat32()
        val precision = options.javaClass.getDeclaredField("precision").also { it.isAccessible = true }
        assertEquals(Precision.FP32, precision.get(options))
    }
}
