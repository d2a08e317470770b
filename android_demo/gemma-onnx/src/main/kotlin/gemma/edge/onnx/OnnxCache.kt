package gemma.edge.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import gemma.edge.CacheGeometry
import gemma.edge.engine.SavedCache
import gemma.edge.engine.StoredTensor
import gemma.edge.engine.direct
import gemma.edge.engine.endAt
import gemma.edge.engine.goTo
import java.nio.ByteBuffer

/** The tensors of the KV cache, named `LAYER.key` and `LAYER.value`, each (1, kvHeads, slots, headDim), in native memory. */
internal class OnnxCache(private val geometry: CacheGeometry, private val environment: OrtEnvironment) : SavedCache, AutoCloseable {
    private val type = if (geometry.int8) OnnxJavaType.INT8 else OnnxJavaType.FLOAT
    private val rowBytes = geometry.headDim * type.size
    private val slots: Map<String, Int> =
        geometry.layers.flatMapIndexed { index, layer -> listOf("$index.key" to layer.slots, "$index.value" to layer.slots) }.toMap()
    private val byName = LinkedHashMap<String, OnnxTensor>()

    /** The tensors by name. [fill] and [move] replace them. */
    val tensors: Map<String, OnnxTensor> get() = byName

    init {
        try {
            val zeros = HashMap<Int, ByteBuffer>() // by slots: local and global layers have different numbers of them
            NativeTensors(environment, type).use { memory ->
                for ((name, count) in slots) byName[name] = memory.copyOf(zeros.getOrPut(count) { direct(bytesOf(count)) }, shape(count))
            }
        } catch (error: Throwable) {
            close()
            throw error
        }
    }

    /** The part of each tensor that is in use: (1, kvHeads, rows, headDim). */
    override fun saved(written: Int): List<StoredTensor> = slots.map { (name, count) ->
        StoredTensor(PREFIX + name, if (geometry.int8) "I8" else "F32", shape(minOf(count, written)).map { it.toInt() })
    }

    /** See SavedCache; head by head. */
    override fun rows(saved: StoredTensor): List<ByteBuffer> {
        val name = saved.name.removePrefix(PREFIX)
        val all = byName.getValue(name).byteBuffer // a copy of the tensor
        val head = bytesOf(slots.getValue(name)) / geometry.kvHeads
        return List(geometry.kvHeads) { part(all, it * head, saved.bytes.toInt() / geometry.kvHeads) }
    }

    override fun fill(saved: List<StoredTensor>, read: (StoredTensor) -> ByteBuffer) {
        // one buffer per size, because the memory of a direct buffer is freed only when the garbage collector finds it
        val whole = HashMap<Int, ByteBuffer>()
        NativeTensors(environment, type).use { memory ->
            for (tensor in saved) {
                val name = tensor.name.removePrefix(PREFIX)
                val count = slots.getValue(name)
                val rows = read(tensor)
                val all = whole.getOrPut(count) { direct(bytesOf(count)) }
                for (head in 0 until geometry.kvHeads) {
                    all.goTo(head * (all.capacity() / geometry.kvHeads))
                    all.put(part(rows, head * (rows.capacity() / geometry.kvHeads), rows.capacity() / geometry.kvHeads))
                }
                all.goTo(0)
                byName.put(name, memory.copyOf(all, shape(count)))?.close()
            }
        }
    }

    /** Give the layers that keep the beginning of a text the rows with these numbers, each once for every row that there is. */
    fun move(rows: (slots: Int) -> LongArray) {
        RowGather(environment, type).use { gather ->
            for ((index, layer) in geometry.layers.withIndex()) {
                if (layer.pinned == 0) continue
                val numbers = rows(layer.slots)
                for (name in listOf("$index.key", "$index.value")) byName.put(name, gather.gathered(byName.getValue(name), numbers))?.close()
            }
        }
    }

    override fun close(): Unit = byName.values.forEach { it.close() }

    private fun bytesOf(count: Int) = rowBytes * count * geometry.kvHeads

    private fun shape(rows: Int) = longArrayOf(1, geometry.kvHeads.toLong(), rows.toLong(), geometry.headDim.toLong())

    private fun part(buffer: ByteBuffer, start: Int, bytes: Int): ByteBuffer {
        val view = buffer.duplicate()
        view.goTo(start)
        view.endAt(start + bytes)
        return view.slice()
    }

    private companion object {
        const val PREFIX = "cache."
    }
}
