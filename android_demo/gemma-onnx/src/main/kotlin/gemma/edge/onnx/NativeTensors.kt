package gemma.edge.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer

/**
 * Makes tensors in ONNX Runtime's own memory. On Android a direct ByteBuffer is allocated in the Java heap, whose limit of 256 to
 * 512 MiB is smaller than a large KV cache. The Java API has no other way to allocate a tensor, but the outputs of a graph are in native
 * memory. Therefore this class runs a graph of one Identity node and keeps its output. Source of the field numbers: onnx.proto.
 */
internal class NativeTensors(private val environment: OrtEnvironment, private val type: OnnxJavaType) : AutoCloseable {
    private val session: OrtSession = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(1)
        options.setCPUArenaAllocator(false) // an arena allocates in powers of two and does not give memory back
        environment.createSession(identityGraph(ELEMENT.getValue(type)), options)
    }

    /** A tensor of the same shape and contents as a direct buffer. */
    fun copyOf(buffer: ByteBuffer, shape: LongArray): OnnxTensor = OnnxTensor.createTensor(environment, buffer, shape, type).use {
        session.run(mapOf(INPUT to it)).get(0) as OnnxTensor // the result is not closed, because that would free the tensor
    }

    override fun close(): Unit = session.close()

    private companion object {
        const val INPUT = "x"
        const val OUTPUT = "y"
        val ELEMENT = mapOf(OnnxJavaType.FLOAT to 1, OnnxJavaType.INT8 to 3) // TensorProto.DataType

        fun identityGraph(element: Int): ByteArray {
            val node = message { text(1, INPUT); text(2, OUTPUT); text(4, "Identity") }
            val graph = message {
                bytes(1, node)
                text(2, "copy")
                bytes(11, tensor(INPUT, element))
                bytes(12, tensor(OUTPUT, element))
            }
            return message {
                number(1, 8) // ir_version
                bytes(7, graph)
                bytes(8, message { text(1, ""); number(2, 13) }) // opset of the default domain
            }
        }

        fun tensor(name: String, element: Int) = message {
            text(1, name)
            bytes(2, message { bytes(1, message { number(1, element) }) })
        }

        fun message(fill: Message.() -> Unit): ByteArray = Message().apply(fill).out.toByteArray()
    }

    /** A protobuf message in its wire format. All lengths here are below 128, so each takes one byte. */
    private class Message {
        val out = ByteArrayOutputStream()

        fun number(field: Int, value: Int) {
            out.write(field shl 3)
            out.write(value)
        }

        fun bytes(field: Int, value: ByteArray) {
            check(value.size < 128)
            out.write(field shl 3 or 2)
            out.write(value.size)
            out.write(value)
        }

        fun text(field: Int, value: String) = bytes(field, value.toByteArray())
    }
}
