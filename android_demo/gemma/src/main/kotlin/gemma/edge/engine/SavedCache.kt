package gemma.edge.engine

import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A KV cache that can be read and written, so that its state can be saved. */
@EngineApi
public interface SavedCache {
    /** The tensors of a state after [written] positions. */
    public fun saved(written: Int): List<StoredTensor>

    /** The bytes of one of these tensors, in pieces. */
    public fun rows(saved: StoredTensor): List<ByteBuffer>

    /** Fill the cache with saved tensors; [read] returns the bytes of one of them. */
    public fun fill(saved: List<StoredTensor>, read: (StoredTensor) -> ByteBuffer)

    /** Bring the rows into the order that follows from the two numbers alone, before they are read. A ring has them in it anyway. */
    public fun settle(position: Int, written: Int): Unit = Unit

    /** The cache was filled with rows in that order. */
    public fun settled(position: Int, written: Int): Unit = Unit
}

/** One tensor of a safetensors file; [dtype] is the type's name there. */
@EngineApi
public data class StoredTensor(public val name: String, public val dtype: String, public val shape: List<Int>) {
    /** Its size in the file; -1 for one that is too large for an array. */
    public val bytes: Long get() = shape.fold(ITEM_BYTES.getValue(dtype)) { product, size ->
        if (product < 0 || product * size > Int.MAX_VALUE) -1 else product * size
    }

    internal companion object {
        val ITEM_BYTES = mapOf("I8" to 1L, "F16" to 2L, "I32" to 4L, "F32" to 4L)
    }
}

// These are functions of Buffer, because ByteBuffer has no `position` and `limit` of its own before Android 9.

/** Set the position of a buffer. */
@EngineApi
public fun Buffer.goTo(place: Int) {
    position(place)
}

/** Set the limit of a buffer. */
@EngineApi
public fun Buffer.endAt(end: Int) {
    limit(end)
}

/** A direct buffer with the machine's order of bytes. */
@EngineApi
public fun direct(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
