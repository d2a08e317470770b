package gemma.edge.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import gemma.edge.Adapter
import gemma.edge.Backend
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.GemmaException
import gemma.edge.GemmaRuntime
import gemma.edge.engine.ChunkedRuntime
import gemma.edge.engine.Engine
import gemma.edge.engine.EngineLibrary
import gemma.edge.engine.EngineOptions
import gemma.edge.engine.Resources
import gemma.edge.engine.SavedCache
import gemma.edge.engine.StoredTensor
import gemma.edge.engine.direct
import gemma.edge.engine.endAt
import gemma.edge.engine.goTo
import gemma.edge.engine.isFactor
import gemma.edge.engine.noNativeLibrary
import java.nio.ByteBuffer
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** ONNX Runtime, through its Java API. */
public class OnnxEngine : Engine {
    override fun open(bundle: Bundle, backend: Backend, options: EngineOptions): GemmaRuntime =
        OnnxRuntime(bundle, backend, environment(), options.threads)

    private fun environment(): OrtEnvironment {
        var made: Result<OrtEnvironment>? = null
        // while it looks for devices, ONNX Runtime matches regular expressions recursively; on one machine that was 12,000 frames
        // deep, too deep for a stack of 1 MiB
        val thread = Thread(null, { made = runCatching { OrtEnvironment.getEnvironment() } }, "onnxruntime", ENVIRONMENT_STACK)
        thread.start()
        thread.join()
        val environment = made!!.getOrElse { error ->
            throw if (error is LinkageError) noNativeLibrary("ONNX Runtime", error) else error
        }
        return environment.also { it.setTelemetry(false) }
    }

    private companion object {
        // ENVIRONMENT_STACK: stack of the thread that starts ONNX Runtime, in bytes.
        const val ENVIRONMENT_STACK = 16L shl 20
    }
}

/**
 * Runs a bundle's ONNX backend on the CPU. Every tensor of the cache is both an input and an output of a step, so the graph updates it in
 * place. The graph moves the window of a layer itself, except in global layers that keep the beginning of a text: [MovingRows]. It reads
 * only rows that it has written. Therefore there is no last position, and a reset does not have to clear the buffers. The inputs and outputs of the graph are described in docs/export/bundle-format.md.
 */
internal class OnnxRuntime(bundle: Bundle, backend: Backend, private val environment: OrtEnvironment, private val threads: Int) :
    ChunkedRuntime(bundle, backend) {
    private val resources = Resources()
    private var graph: OnnxGraph? = null // null only while another one is opened
    private var graphOf: Adapter? = null // an adapter whose graph is open; it also computes without one
    private val inputs = HashMap<String, OnnxTensor>()
    private val outputs = HashMap<String, OnnxTensor>()
    private val inputPos: LongBuffer = direct(Long.SIZE_BYTES).asLongBuffer()
    private val pastRows: LongBuffer = direct(Long.SIZE_BYTES).asLongBuffer()
    private var biasBuffer: FloatBuffer = direct(0).asFloatBuffer()
    private val idBuffer: LongBuffer = direct(Long.SIZE_BYTES * backend.cache.prefillChunk).asLongBuffer()
    private val idTensors = HashMap<Int, OnnxTensor>() // by length: one token, a whole chunk, and the last chunk of a prompt
    private val logitsBuffer: FloatBuffer = direct(Float.SIZE_BYTES * bundle.vocabSize).asFloatBuffer()
    private val logits = FloatArray(bundle.vocabSize)
    private val cache: OnnxCache
    private val moving: MovingRows? // null if the bundle keeps no beginning of a text

    override val library = EngineLibrary("onnxruntime", environment.version)

    override val savedCache: SavedCache get() = BoundCache()

    init {
        try {
            graph = OnnxGraph.open(bundle, backend.program, environment, threads)
            cache = resources.add(OnnxCache(backend.cache, environment))
            moving = if (backend.cache.pinned == 0) null else MovingRows(backend.cache) { rows ->
                try {
                    cache.move(rows)
                } finally {
                    bindCache()
                }
            }
            bindCache()
            if (moving != null) inputs["past_rows"] = resources.add(OnnxTensor.createTensor(environment, pastRows, longArrayOf(1)))
            inputs["input_pos"] = resources.add(OnnxTensor.createTensor(environment, inputPos, longArrayOf(1)))
            outputs["logits"] = resources.add(
                OnnxTensor.createTensor(environment, logitsBuffer, longArrayOf(1, 1, bundle.vocabSize.toLong())),
            )
            graph?.checkContract(contract())
        } catch (error: OrtException) {
            free()
            throw BundleException("${bundle.folder} cannot be opened: ${error.message}; import the bundle again", error)
        } catch (error: GemmaException) {
            free()
            throw error
        }
    }

    override fun forward(ids: IntArray, start: Int, end: Int) {
        for (i in start until end) idBuffer.put(i - start, ids[i].toLong())
        inputPos.put(0, position.toLong())
        inputs["input_ids"] = idTensor(end - start)
        if (moving == null) return run()
        val past = moving.makeRoom(position, end - start)
        pastRows.put(0, past.toLong())
        bias(moving, end - start, past + end - start).use { bias ->
            inputs[BIAS] = bias
            try {
                run()
            } finally {
                inputs.remove(BIAS)
            }
        }
    }

    private fun run() {
        val session = graph?.session ?: throw BundleException("${bundle.folder} has no open graph; open the bundle again")
        session.run(inputs, emptySet(), outputs).close() // this leaves the outputs that it was given open
    }

    /** What is added to the scores of the next [tokens] queries: (1, 1, tokens, [rows]). */
    private fun bias(moving: MovingRows, tokens: Int, rows: Int): OnnxTensor {
        // one buffer for all calls, because the memory of a direct buffer is freed only when the garbage collector finds it
        if (biasBuffer.capacity() < tokens * rows) {
            val longest = backend.cache.layers.maxOf { it.slots }
            biasBuffer = direct(Float.SIZE_BYTES * longest * (if (tokens == 1) 1 else backend.cache.prefillChunk)).asFloatBuffer()
        }
        biasBuffer.endAt(biasBuffer.capacity())
        moving.bias(position, tokens, pinned, biasBuffer)
        biasBuffer.endAt(tokens * rows)
        return OnnxTensor.createTensor(environment, biasBuffer, longArrayOf(1, 1, tokens.toLong(), rows.toLong()))
    }

    override fun clear() {
        moving?.clear()
    }

    /**
     * A local window is contiguous. When a layer of C slots is full, the rows before its window of W move out, C - W + 1 at a time. Rows are
     * where they were if as many moves lie before both positions.
     */
    override fun holds(position: Int, written: Int): Boolean {
        if (moving != null && !moving.holds(position, written)) return false
        return backend.cache.layers.filter { it.pinned == 0 }.all { layer ->
            val step = layer.slots - layer.window + 1
            fun moves(total: Int) = (maxOf(0, total - layer.slots) + step - 1) / step
            moves(position) == moves(written)
        }
    }

    override fun free() {
        idTensors.values.forEach { it.close() }
        graph?.close()
        resources.close()
    }

    override val takesAdapters: Boolean get() = true

    override fun take(adapter: Adapter?) {
        val before = graphOf
        try {
            compute(adapter, adapter ?: before)
        } catch (error: GemmaException) {
            compute(this.adapter, before)
            throw error
        }
    }

    /** Compute with an adapter, in the graph of one, from now on. The open graph is closed before another one packs its weights. */
    private fun compute(adapter: Adapter?, of: Adapter?) {
        if (graph?.digest != of?.graphDigest.orEmpty()) {
            graph?.close()
            graph = null
            val opened = if (of == null) {
                OnnxGraph.open(bundle, backend.program, environment, threads)
            } else {
                OnnxGraph.open(bundle, of, environment, threads)
            }
            graph = opened
            opened.checkContract(contract())
        }
        graphOf = of
        graph?.take(adapter)
        inputs.keys.removeAll(::isFactor)
        inputs.putAll(graph?.inputs.orEmpty())
    }

    /** A tensor of the first [length] ids; the tensors of all lengths share one buffer. */
    private fun idTensor(length: Int): OnnxTensor = idTensors.getOrPut(length) {
        val rare = idTensors.keys.filter { it != 1 && it != backend.cache.prefillChunk }
        rare.forEach { idTensors.remove(it)?.close() }
        val first = idBuffer.slice().also { it.endAt(length) }
        OnnxTensor.createTensor(environment, first, longArrayOf(1, length.toLong()))
    }

    override fun logits(): FloatArray {
        logitsBuffer.goTo(0)
        logitsBuffer.get(logits)
        return logits
    }

    private fun bindCache() {
        for ((name, tensor) in cache.tensors) {
            inputs["past_key_values.$name"] = tensor
            outputs["present.$name"] = tensor
        }
    }

    /** The types and shapes that a graph of this bundle must have. */
    private fun contract(): Map<String, Pair<OnnxJavaType, LongArray>> {
        val bound = inputs.filterKeys { !isFactor(it) } + outputs
        val fixed = bound.mapValues { (_, tensor) -> tensor.info.type to tensor.info.shape } +
            ("input_ids" to (OnnxJavaType.INT64 to longArrayOf(1, OnnxGraph.ANY)))
        if (moving == null) return fixed
        return fixed + (BIAS to (OnnxJavaType.FLOAT to longArrayOf(1, 1, OnnxGraph.ANY, OnnxGraph.ANY)))
    }

    /** The cache, bound to the session again after its tensors were replaced. */
    private inner class BoundCache : SavedCache by cache {
        override fun fill(saved: List<StoredTensor>, read: (StoredTensor) -> ByteBuffer) {
            try {
                cache.fill(saved, read)
            } finally {
                bindCache()
            }
        }

        override fun settle(position: Int, written: Int) {
            moving?.settle(position, written)
        }

        override fun settled(position: Int, written: Int) {
            moving?.settled(position, written)
        }
    }

    private companion object {
        const val BIAS = "attention_bias"
    }
}
