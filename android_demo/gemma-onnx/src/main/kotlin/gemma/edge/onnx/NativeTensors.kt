package gemma.edge.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import gemma.edge.engine.direct
import gemma.edge.engine.goTo
import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer

/**
 * Makes tensors in ONNX Runtime's own memory. On Android a direct ByteBuffer is allocated in the Java heap, whose limit of 256 to
 * 512 MiB is smaller than a large KV cache. The Java API has no other way to allocate a tensor, but the outputs of a graph are in native
 * memory. Therefore this class runs a graph of one node, Identity, and keeps its output.
 */
internal class NativeTensors(private val environment: OrtEnvironment, private val type: OnnxJavaType) : AutoCloseable {
    private val session = OneNode.session(environment, "Identity", listOf(type), type)

    /** A tensor of the same shape and contents as a direct buffer. */
    fun copyOf(buffer: ByteBuffer, shape: LongArray): OnnxTensor = OnnxTensor.createTensor(environment, buffer, shape, type).use {
        OneNode.run(session, it)
    }

    override fun close(): Unit = session.close()
}

/** Puts rows of tensors (1, heads, rows, size) in another order, in ONNX Runtime's own memory, which Java cannot write. */
internal class RowGather(private val environment: OrtEnvironment, type: OnnxJavaType) : AutoCloseable {
    private val session = OneNode.session(environment, "Gather", listOf(type, OnnxJavaType.INT64), type, axis = 2)

    /** A new tensor of the rows with these numbers. */
    fun gathered(tensor: OnnxTensor, rows: LongArray): OnnxTensor {
        val numbers = direct(Long.SIZE_BYTES * rows.size).asLongBuffer().put(rows)
        numbers.goTo(0)
        return OnnxTensor.createTensor(environment, numbers, longArrayOf(rows.size.toLong())).use { OneNode.run(session, tensor, it) }
    }

    override fun close(): Unit = session.close()
}

/** Graphs of one node. Source of the field numbers: onnx.proto. */
private object OneNode {
    private const val OUTPUT = "y"
    private val ELEMENT = mapOf(OnnxJavaType.FLOAT to 1, OnnxJavaType.INT8 to 3, OnnxJavaType.INT64 to 7) // TensorProto.DataType

    fun session(environment: OrtEnvironment, operator: String, inputs: List<OnnxJavaType>, output: OnnxJavaType, axis: Int? = null): OrtSession =
        OrtSession.SessionOptions().use { options ->
            options.setIntraOpNumThreads(1)
            options.setCPUArenaAllocator(false) // an arena allocates in powers of two and does not give memory back
            environment.createSession(graph(operator, inputs, output, axis), options)
        }

    /** The output of a graph, which belongs to the caller. */
    fun run(session: OrtSession, vararg inputs: OnnxTensor): OnnxTensor =
        // the result is not closed, because that would free the tensor
        session.run(inputs.withIndex().associate { (index, tensor) -> name(index) to tensor }).get(0) as OnnxTensor

    private fun name(input: Int) = "x$input"

    private fun graph(operator: String, inputs: List<OnnxJavaType>, output: OnnxJavaType, axis: Int?): ByteArray {
        val node = message {
            inputs.indices.forEach { text(1, name(it)) }
            text(2, OUTPUT)
            text(4, operator)
            if (axis != null) bytes(5, message { text(1, "axis"); number(3, axis); number(20, 2) }) // AttributeProto.INT
        }
        val graph = message {
            bytes(1, node)
            text(2, "graph")
            inputs.forEachIndexed { index, type -> bytes(11, tensor(name(index), type)) }
            bytes(12, tensor(OUTPUT, output))
        }
        return message {
            number(1, 8) // ir_version
            bytes(7, graph)
            bytes(8, message { text(1, ""); number(2, 13) }) // opset of the default domain
        }
    }

    private fun tensor(name: String, type: OnnxJavaType) = message {
        text(1, name)
        bytes(2, message { bytes(1, message { number(1, ELEMENT.getValue(type)) }) })
    }

    private fun message(fill: Message.() -> Unit): ByteArray = Message().apply(fill).out.toByteArray()

    /** A protobuf message in its wire format. All lengths and values here are below 128, so each takes one byte. */
    private class Message {
        val out = ByteArrayOutputStream()

        fun number(field: Int, value: Int) {
            tag(field, 0)
            out.write(value)
        }

        fun bytes(field: Int, value: ByteArray) {
            check(value.size < 128)
            tag(field, 2)
            out.write(value.size)
            out.write(value)
        }

        fun text(field: Int, value: String) = bytes(field, value.toByteArray())

        /** A field's number and type; from 128 on it takes two bytes. */
        private fun tag(field: Int, type: Int) {
            val tag = field shl 3 or type
            if (tag < 128) return out.write(tag)
            out.write(tag and 127 or 128)
            out.write(tag shr 7)
        }
    }
}
