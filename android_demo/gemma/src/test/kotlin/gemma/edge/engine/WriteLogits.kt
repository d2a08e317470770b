package gemma.edge.engine

import gemma.edge.Bundle
import gemma.edge.Fixtures
import gemma.edge.GemmaRuntime
import gemma.edge.run
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** Writes the logits of every bundle's backend, for tools/native/parity.py to compare. */
internal object WriteLogits {
    @JvmStatic
    fun main(arguments: Array<String>) {
        val backend = arguments.single()
        for (model in Fixtures.models) {
            GemmaRuntime.open(Bundle.open(model.bundle), backend, threads = 1).use { runtime ->
                val logits = runtime.run(model)
                val bytes = ByteBuffer.allocate(Float.SIZE_BYTES * logits.size).order(ByteOrder.LITTLE_ENDIAN)
                bytes.asFloatBuffer().put(logits)
                File(model.fromKotlin, "$backend.f32").writeBytes(bytes.array())
            }
        }
        Runtime.getRuntime().halt(0) // the usual end would call into Android's libraries, which glibc does not know
    }
}
