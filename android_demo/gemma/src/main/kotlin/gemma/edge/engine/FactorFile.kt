package gemma.edge.engine

import gemma.edge.JsonException
import gemma.edge.state.Safetensors
import java.io.File
import java.nio.ByteBuffer

/**
 * One of a linear's two factors: A (in, rank) or B (rank, out), the scaling included. The graph computes y = W x + (x A) B.
 *
 * @property name of the graph's input: the linear's, and `.a` or `.b`.
 * @property shape rows and columns.
 * @property values row by row.
 */
@EngineApi
public class Factor(public val name: String, public val shape: List<Int>, public val values: FloatArray)

/** Whether a graph's input is a factor. */
@EngineApi
public fun isFactor(name: String): Boolean = name.endsWith(A) || name.endsWith(B)

/** The factors of an adapter, stored as float32, float16 or int8. `_factors` in runtimes/engines/adapter.py reads the same. */
@OptIn(EngineApi::class)
internal class FactorFile(val path: File) {
    /**
     * Read the factors one by one.
     *
     * @throws JsonException a factor is missing, or is no matrix of finite numbers, or the ranks of two differ.
     * @throws java.io.IOException the file cannot be read.
     */
    fun forEach(act: (Factor) -> Unit) = Safetensors.open(path).use { file ->
        val stored = file.tensors.associateBy { it.name }
        for (linear in stored.keys.filter(::isFactor).map { it.dropLast(A.length) }.toSortedSet()) {
            val a = read(file, stored, linear + A, rankAt = 1)
            val b = read(file, stored, linear + B, rankAt = 0)
            if (a.shape[1] != b.shape[0]) throw JsonException("$linear has ranks ${a.shape[1]} and ${b.shape[0]}")
            act(a)
            act(b)
        }
    }

    private fun read(file: Safetensors, stored: Map<String, StoredTensor>, name: String, rankAt: Int): Factor {
        val tensor = stored[name]?.takeIf { it.shape.size == 2 && it.dtype in FLOATS.keys + I8 } ?: throw JsonException("it has no matrix $name")
        val columns = tensor.shape[1]
        val values = if (tensor.dtype == I8) {
            val codes = file.read(tensor)
            val scales = stored["${name}_scale"]?.takeIf { it.dtype in FLOATS && it.shape == listOf(tensor.shape[rankAt]) }
                ?: throw JsonException("it has no ${name}_scale with one scale for each rank")
            val scale = floats(file, scales)
            FloatArray(codes.remaining()) { codes.get(it) * scale[if (rankAt == 1) it % columns else it / columns] }
        } else {
            floats(file, tensor)
        }
        if (values.any { !it.isFinite() }) throw JsonException("$name holds NaN or infinite values")
        return Factor(name, tensor.shape, values)
    }

    private fun floats(file: Safetensors, tensor: StoredTensor): FloatArray = FLOATS.getValue(tensor.dtype)(file.read(tensor))

    private companion object {
        const val I8 = "I8"

        // FLOATS: how the values of each type are read.
        val FLOATS: Map<String, (ByteBuffer) -> FloatArray> = mapOf(
            "F32" to { bytes -> bytes.asFloatBuffer().let { from -> FloatArray(from.remaining()) { from.get(it) } } },
            "F16" to { bytes -> bytes.asShortBuffer().let { from -> FloatArray(from.remaining()) { halfToFloat(from.get(it)) } } },
        )
    }
}

private const val A = ".a"
private const val B = ".b"

/** The value of an IEEE 754 half, whose 16 bits are sign, five of exponent and ten of fraction. */
internal fun halfToFloat(half: Short): Float {
    val bits = half.toInt()
    val sign = bits and 0x8000 shl 16
    val exponent = bits shr 10 and 0x1f
    val fraction = bits and 0x3ff
    return when (exponent) {
        0 -> Float.fromBits(sign or (fraction * SMALLEST_HALF).toBits()) // zero, or subnormal
        0x1f -> Float.fromBits(sign or 0x7f800000 or (fraction shl 13)) // infinite, or NaN
        else -> Float.fromBits(sign or (exponent - 15 + 127 shl 23) or (fraction shl 13))
    }
}

private const val SMALLEST_HALF = 5.9604645E-8f // 2 to the power of -24
