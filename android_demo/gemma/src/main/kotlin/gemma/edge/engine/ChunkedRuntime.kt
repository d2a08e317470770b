package gemma.edge.engine

import gemma.edge.Adapter
import gemma.edge.AdapterException
import gemma.edge.Backend
import gemma.edge.Bundle
import gemma.edge.Device
import gemma.edge.GemmaRuntime
import gemma.edge.InputException
import gemma.edge.JsonException
import gemma.edge.StateException
import gemma.edge.UnsupportedException
import gemma.edge.state.StateFile
import gemma.edge.state.StateHeader
import gemma.edge.text.IntList
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * What all engines share: checks, chunks, positions, rewinding and saved states. `Runtime` in runtimes/engines/base.py does the same.
 * An engine runs one chunk in [forward], and hands out the logits of its last token in [logits].
 */
@EngineApi
public abstract class ChunkedRuntime(final override val bundle: Bundle, final override val backend: Backend) : GemmaRuntime {
    private val kept = IntList(keep = maxOf(MIN_KEPT_IDS, backend.cache.reach + backend.cache.context))
    private val first = IntArray(backend.cache.pinned) // ids of the first tokens, as many as could be pinned
    private var written = 0 // highest position written so far; larger than `position` after tokens were taken back
    private var closed = false

    final override var position: Int = 0
        private set

    final override var pinned: Int = 0
        private set

    final override var adapter: Adapter? = null
        private set

    final override val ids: IntArray
        @Synchronized get() = kept.toArray()

    /** The cache, if it can be read and written; null has states saved without it, and fed again. */
    protected abstract val savedCache: SavedCache?

    /** The largest number of tokens that [forward] takes. */
    protected open val atOnce: Int get() = backend.cache.prefillChunk

    /** Whether [take] can be called. */
    protected open val takesAdapters: Boolean get() = false

    /** Compute with an adapter of this bundle from now on, or with none. If it cannot, everything is as before. */
    protected open fun take(adapter: Adapter?): Unit = Unit

    /** Let the cache be written from any position on. */
    protected open fun clear(): Unit = Unit

    /** Run the tokens from [start] until [end] of [ids] at [position]. At position 0 the cache must forget what it holds. */
    protected abstract fun forward(ids: IntArray, start: Int, end: Int)

    /** The logits after the last token of the last call of [forward], in an array that may be used again. */
    protected abstract fun logits(): FloatArray

    /** Free the model's memory; called once. */
    protected abstract fun free()

    /**
     * Whether the cache still has every key that a text needs to go on at [position], if the highest position that was written is
     * [written]. This is the answer for a ring, which has position p in slot p mod slots.
     */
    protected open fun holds(position: Int, written: Int): Boolean =
        backend.cache.layers.all { maxOf(0, position - it.window + 1 - it.pinned) >= written - it.slots }

    @Synchronized
    final override fun prefill(ids: IntArray): FloatArray {
        checkOpen()
        if (ids.isEmpty()) throw InputException("there is no token to feed; give at least one token id")
        val bad = ids.firstOrNull { it !in 0 until bundle.vocabSize }
        if (bad != null) throw InputException("token id $bad is not below the vocabulary size ${bundle.vocabSize}")
        feed(ids)
        return logits()
    }

    @Synchronized
    final override fun decode(token: Int): FloatArray = prefill(intArrayOf(token))

    @Synchronized
    final override fun reset() {
        startAt(0)
    }

    @Synchronized
    final override fun pin(count: Int) {
        checkOpen()
        val most = backend.cache.pinned
        if (count !in 0..most) {
            throw InputException("cannot pin $count tokens: this bundle keeps at most $most beyond its context; export it with a larger --pinned")
        }
        if (count != pinned && position > backend.cache.context) startAt(0)
        pinned = count
    }

    @Synchronized
    final override fun useAdapter(adapter: Adapter?) {
        checkOpen()
        if (identityWith(adapter) == identityWith(this.adapter)) return
        if (adapter != null) check(adapter)
        startAt(0)
        take(adapter)
        this.adapter = adapter
    }

    @Synchronized
    final override fun rewind(count: Int) {
        checkOpen()
        val target = position - count
        val remembered = position - kept.size
        if (count < 0 || count > kept.size) {
            throw InputException("cannot rewind $count tokens: the last ${kept.size} of $position are remembered; give 0 to ${kept.size}")
        }
        val free = count == 0 || holds(target, written)
        if (!free && remembered > maxOf(0, target - backend.cache.reach)) {
            throw InputException("cannot rewind $count tokens: too few of the tokens before them are remembered; reset, and feed the text again")
        }
        kept.removeLast(count)
        position = target
        if (!free) feedAgain(kept.toArray())
    }

    @Synchronized
    final override fun save(file: File, notes: String) {
        checkOpen()
        val last = kept.toArray()
        val cache = savedCache
        cache?.settle(position, written)
        val ids = mapOf(StateFile.IDS to last, StateFile.FIRST to first.copyOf(minOf(pinned, position)))
            .filter { (name, ids) -> name == StateFile.IDS || ids.isNotEmpty() }
        val tensors = ids.map { (name, ids) -> StoredTensor(name, "I32", listOf(ids.size)) } + cache?.saved(written).orEmpty()
        StateFile.write(file, StateHeader(identityWith(adapter), position, written, pinned, notes), tensors) { tensor ->
            ids[tensor.name]?.let { listOf(bytesOf(it)) } ?: cache?.rows(tensor).orEmpty()
        }
    }

    @Synchronized
    final override fun load(file: File): String {
        checkOpen()
        StateFile.open(file).use { state ->
            val header = state.header
            val identity = identityWith(adapter)
            if (header.identity != identity) {
                throw StateException(
                    "$file belongs to another bundle, backend or adapter (${header.identity.take(16)}...; this one is ${identity.take(16)}...); " +
                        "feed its text again",
                )
            }
            val last = idsIn(state)
            val pinnedIds = pinnedIdsIn(state)
            val cache = savedCache
            val rows = state.tensors.filter { it.name != StateFile.IDS && it.name != StateFile.FIRST }
            if (cache != null && rows.isNotEmpty()) {
                fill(cache, state, rows)
                startAt(0)
                cache.settled(header.position, header.written)
                kept.addAll(last)
                written = header.written
            }
            position = header.position
            pinned = header.pinned
            pinnedIds.copyInto(first)
            if (last.size == position) last.copyInto(first, 0, 0, minOf(first.size, position))
            if (cache == null || rows.isEmpty()) feedAgain(last) // a state without a cache
            return header.notes
        }
    }

    @Synchronized
    final override fun close() {
        if (closed) return
        closed = true
        free()
    }

    private fun check(adapter: Adapter) {
        if (!takesAdapters) {
            throw UnsupportedException(
                "${bundle.folder}: the ${backend.name} backend takes no adapters; use the onnx backend, " +
                    "or merge the adapter into a bundle of its own with gemma-export --lora",
            )
        }
        if (adapter.base != backend.identity) {
            throw AdapterException(
                "the adapter ${adapter.folder} was made for another bundle than ${bundle.folder}; " +
                    "make it again with gemma-export adapter and this bundle as --base",
            )
        }
        Device.current().requireMemoryFor(adapter)
    }

    /** The hash of what a state depends on: `adapted_identity` in runtimes/engines/adapter.py. */
    private fun identityWith(adapter: Adapter?): String =
        if (adapter == null) backend.identity else sha256 { update("${backend.identity} ${adapter.digest}".toByteArray()) }

    private fun checkOpen() = check(!closed) { "the runtime was closed" }

    private fun feed(ids: IntArray) {
        var done = false
        try {
            for (start in ids.indices step atOnce) {
                val end = minOf(start + atOnce.toLong(), ids.size.toLong()).toInt()
                forward(ids, start, end)
                for (i in position until minOf(position + end - start, first.size)) first[i] = ids[start + i - position]
                position += end - start
                written = maxOf(written, position)
                for (i in start until end) kept.add(ids[i])
            }
            done = true
        } finally {
            if (!done) startAt(0) // the contents of the cache are unknown
        }
    }

    /** Write the cache anew with what is pinned and with [last], the tokens before [position]. */
    private fun feedAgain(last: IntArray) {
        val start = position - last.size
        startAt(0)
        if (start > 0 && pinned > 0) feed(first.copyOf(minOf(pinned, start)))
        position = start
        written = start
        kept.clear()
        if (last.isNotEmpty()) feed(last)
    }

    private fun startAt(start: Int) {
        clear()
        position = start
        written = start
        kept.clear()
    }

    private fun fill(cache: SavedCache, state: StateFile, saved: List<StoredTensor>) {
        val expected = cache.saved(state.header.written)
        val different = (saved - expected.toSet() + (expected - saved.toSet())).firstOrNull()
        if (different != null) throw StateException("the state is damaged: ${different.name} is not what this bundle has; save it again")
        var complete = false
        try {
            cache.fill(expected) { tensor -> state.read(tensor).also { checkFinite(tensor, it) } }
            complete = true
        } catch (error: JsonException) {
            throw StateException("the state is damaged (${error.message}); save it again", error)
        } finally {
            if (!complete) startAt(0) // the contents of the cache are unknown
        }
    }

    private fun checkFinite(tensor: StoredTensor, bytes: ByteBuffer) {
        if (tensor.dtype != "F32") return
        val floats = bytes.asFloatBuffer()
        while (floats.hasRemaining()) if (!floats.get().isFinite()) throw JsonException("${tensor.name} holds numbers that are not finite")
    }

    private fun idsIn(state: StateFile): IntArray {
        val ids = idsIn(state, StateFile.IDS)
        val position = state.header.position
        if (ids == null || ids.size > position || (position > 0 && ids.isEmpty())) {
            throw StateException("the state is damaged: its token ids do not lead to position $position; save it again")
        }
        return ids
    }

    private fun pinnedIdsIn(state: StateFile): IntArray {
        val ids = idsIn(state, StateFile.FIRST) ?: IntArray(0)
        val pinned = state.header.pinned
        if (pinned > backend.cache.pinned || ids.size != minOf(pinned, state.header.position)) {
            throw StateException("the state is damaged: it has ${ids.size} ids of $pinned pinned tokens; save it again")
        }
        return ids
    }

    /** The ids in one of a state's tensors; null if they are none of this vocabulary. */
    private fun idsIn(state: StateFile, name: String): IntArray? {
        val tensor = state.tensors.firstOrNull { it.name == name && it.dtype == "I32" && it.shape.size == 1 } ?: return null
        val ids = IntArray(tensor.shape[0]).also { state.read(tensor).asIntBuffer().get(it) }
        return ids.takeIf { all -> all.all { it in 0 until bundle.vocabSize } }
    }

    private fun bytesOf(ids: IntArray): ByteBuffer {
        val bytes = ByteBuffer.allocate(Int.SIZE_BYTES * ids.size).order(ByteOrder.LITTLE_ENDIAN)
        bytes.asIntBuffer().put(ids)
        return bytes
    }

    private companion object {
        // MIN_KEPT_IDS: how many of the last token ids are kept at least, as in the Python runtime.
        const val MIN_KEPT_IDS = 1 shl 13
    }
}
