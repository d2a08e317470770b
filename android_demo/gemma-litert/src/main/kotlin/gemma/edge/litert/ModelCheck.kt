package gemma.edge.litert

import gemma.edge.engine.Flatbuffer
import gemma.edge.engine.ProgramFile
import gemma.edge.engine.tag
import java.nio.ByteBuffer

/**
 * Follow every offset and index of a model's graph, some of which LiteRT takes unchecked, which can end the process.
 * runtimes/engines/structure/tflite.py does the same. Source: TFLite's schema.fbs. Parts that no bundle uses are left out: sparse
 * tensors, external buffers, options with vectors.
 *
 * @throws gemma.edge.BundleException one leads nowhere.
 */
internal fun checkModel(file: ProgramFile) {
    if (file.beginning(8).tag(4) != "TFL3") file.refuse("it is not a TFLite model")
    val size = minOf(file.bytes, Int.MAX_VALUE.toLong()) // the offsets in a flatbuffer do not reach further
    file.check { Model(file.beginning(size.toInt()), size, file.bytes).check("Model") }
}

private class Model(data: ByteBuffer, size: Long, private val bytes: Long) : Flatbuffer(data, size, SCHEMA, UNIONS, lowest = -1) {
    /** Weights lie behind the flatbuffer, at places that count from the beginning of the file. */
    override fun checkTable(name: String, numbers: Map<Int, Long>) {
        if (name == "Buffer" && outside(numbers[1] ?: 0, numbers[2] ?: 0, bytes)) damaged("weights lie behind the end of the file")
        if (name == "Operator" && outside(numbers[9] ?: 0, numbers[10] ?: 0, bytes)) damaged("options lie behind the end of the file")
    }
}

private val SCHEMA: Map<String, List<String?>> = mapOf(
    "Model" to listOf(
        "4", "[OperatorCode]", "[SubGraph]", "s", "[Buffer]", "[4]<Buffer", "[Metadata]", "[SignatureDef]",
    ),
    "OperatorCode" to listOf("1", "s", "4", "4"),
    "SubGraph" to listOf("[Tensor]", "[4]<Tensor", "[4]<Tensor", "[Operator]", "s", "4"),
    "Tensor" to listOf("[4]", "1", "4<Buffer", "s", "Quantization", "1", null, "[4]", "1"),
    "Quantization" to listOf("[4]", "[4]", "[4]", "[8]", "1", "?4", "4"),
    "Blockwise" to listOf("4", "4", "4"),
    "Operator" to listOf(
        "4<OperatorCode", "[4]<Tensor", "[4]<Tensor", "1", "?3", "[1]", "1", "[1]", "[4]<Tensor", "8", "8", "1",
        "?11", "4",
    ),
    "Buffer" to listOf("[1]", "8", "8"),
    "Metadata" to listOf("s", "4<Buffer"),
    "SignatureDef" to listOf("[TensorMap]", "[TensorMap]", "s", null, "4<SubGraph"),
    "TensorMap" to listOf("s", "4<Tensor*"),
    "Reshape" to listOf("[4]"),
    "Squeeze" to listOf("[4]"),
    "FullyConnected" to listOf("1", "1", "1", "1", "1"),
    "Composite" to listOf("s", "4", "[1]", "1", "4"),
    "VarHandle" to listOf("s", "s"),
    "nothing" to emptyList(),
)

private val UNIONS = mapOf(
    "Quantization.5" to mapOf(
        1L to "nothing", 2L to "Blockwise",
    ),
    "Operator.4" to mapOf(
        3L to "nothing", 8L to "FullyConnected", 17L to "Reshape", 30L to "Squeeze", 111L to "VarHandle",
        115L to "nothing",
    ),
    "Operator.12" to mapOf(
        2L to "nothing", 3L to "nothing", 4L to "nothing", 5L to "nothing", 6L to "nothing", 7L to "nothing",
        9L to "nothing", 10L to "nothing", 12L to "nothing", 13L to "nothing", 16L to "nothing", 17L to "nothing",
        21L to "Composite", 23L to "nothing",
    ),
)
