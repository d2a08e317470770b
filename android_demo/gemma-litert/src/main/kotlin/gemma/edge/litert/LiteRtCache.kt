package gemma.edge.litert

import com.google.ai.edge.litert.TensorBuffer
import gemma.edge.CacheGeometry
import gemma.edge.engine.SavedCache
import gemma.edge.engine.StoredTensor
import gemma.edge.engine.goTo
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs

/**
 * The buffers of the KV cache: keys and values of each layer, and which position each slot holds, by kind of layer. A position p lies in
 * a slot that is at most p (export/tflite/seams.py), so only the first rows are saved while a text is short. `TFLiteRuntime` in
 * runtimes/engines/litert.py saves the same. Where the number of a slot's position is negative, every query sees it: so the first tokens
 * of a text are pinned. The library hands out copies, so one buffer at a time is read and written.
 */
internal class LiteRtCache(private val geometry: CacheGeometry, create: (name: String) -> TensorBuffer) : SavedCache {
    private val kinds = geometry.layers.distinct()
    private var marked = 0 // tokens whose slots say that they are pinned

    /** The buffers by name. */
    val buffers: Map<String, TensorBuffer> = shapesOf(geometry).mapValues { (name, shape) ->
        val elements = shape.fold(1, Int::times)
        create(name).also { if (holdsPositions(name)) it.writeInt(IntArray(elements)) else it.writeFloat(FloatArray(elements)) }
    }

    override fun saved(written: Int): List<StoredTensor> = buffers.keys.map { name ->
        val rows = minOf(slotsOf(name), written)
        if (holdsPositions(name)) {
            StoredTensor(PREFIX + name, "I32", listOf(rows, 1))
        } else {
            StoredTensor(PREFIX + name, "F32", listOf(1, geometry.kvHeads, rows, geometry.headDim))
        }
    }

    /** See SavedCache. A slot that holds nothing is saved as zeros, because an earlier text may have left its rows there. */
    override fun rows(saved: StoredTensor): List<ByteBuffer> {
        val name = saved.name.removePrefix(PREFIX)
        val bytes = ByteBuffer.allocate(saved.bytes.toInt()).order(ByteOrder.LITTLE_ENDIAN)
        val held = heldPositions(heldBy(name)) // without the marks: what is pinned stands in the state
        if (holdsPositions(name)) {
            bytes.asIntBuffer().put(held, 0, saved.shape[0])
            return listOf(bytes)
        }
        val all = buffers.getValue(name).readFloat()
        val floats = bytes.asFloatBuffer()
        val rows = saved.shape[ROWS]
        for (head in 0 until geometry.kvHeads) {
            for (row in 0 until rows) {
                if (held[row] == 0) continue
                floats.goTo((head * rows + row) * geometry.headDim)
                floats.put(all, (head * slotsOf(name) + row) * geometry.headDim, geometry.headDim)
            }
        }
        return listOf(bytes)
    }

    override fun fill(saved: List<StoredTensor>, read: (StoredTensor) -> ByteBuffer) {
        for (tensor in saved) {
            val name = tensor.name.removePrefix(PREFIX)
            val slots = slotsOf(name)
            val bytes = read(tensor)
            if (holdsPositions(name)) {
                buffers.getValue(name).writeInt(IntArray(slots).also { bytes.asIntBuffer().get(it, 0, tensor.shape[0]) })
                continue
            }
            val all = FloatArray(geometry.kvHeads * slots * geometry.headDim)
            val floats = bytes.asFloatBuffer()
            for (head in 0 until geometry.kvHeads) floats.get(all, head * slots * geometry.headDim, tensor.shape[ROWS] * geometry.headDim)
            buffers.getValue(name).writeFloat(all)
        }
        marked = 0
    }

    /** Mark the slots of the first [count] tokens as pinned, and no others. They must have been written. */
    fun mark(count: Int) {
        if (count == marked) return
        kinds.forEachIndexed { kind, layer ->
            if (layer.pinned == 0) return@forEachIndexed
            val held = heldPositions("$HELD$kind")
            for (slot in 0 until count) held[slot] = -held[slot]
            buffers.getValue("$HELD$kind").writeInt(held)
        }
        marked = count
    }

    private fun heldPositions(name: String): IntArray = buffers.getValue(name).readInt().also { held ->
        for (slot in held.indices) held[slot] = abs(held[slot])
    }

    private fun slotsOf(name: String): Int = number(name).let { if (holdsPositions(name)) kinds[it].slots else geometry.layers[it].slots }

    /** The buffer that says which position each slot of a buffer holds. */
    private fun heldBy(name: String): String =
        if (holdsPositions(name)) name else HELD + kinds.indexOf(geometry.layers[number(name)])

    private fun number(name: String) = name.substringAfterLast('_').toInt()

    private fun holdsPositions(name: String) = name.startsWith(HELD)

    companion object {
        private const val PREFIX = "cache."
        private const val HELD = "kv_cache_held_"
        private const val ROWS = 2 // the dimension of a saved tensor that depends on the length of the text

        /** The shapes of the buffers by name. */
        fun shapesOf(geometry: CacheGeometry): Map<String, List<Int>> {
            val layers = geometry.layers.flatMapIndexed { index, layer ->
                listOf("k", "v").map { "kv_cache_${it}_$index" to listOf(1, geometry.kvHeads, layer.slots, geometry.headDim) }
            }
            return (layers + geometry.layers.distinct().mapIndexed { kind, layer -> "$HELD$kind" to listOf(1, 1, 1, layer.slots) }).toMap()
        }
    }
}
