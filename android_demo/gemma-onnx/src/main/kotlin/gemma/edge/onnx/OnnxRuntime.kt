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
 * Runs a bundle's ONNX backend on the CPU. Every tensor of the cache is both an input and a pinned output of a step, so the graph
 * updates it in place. The graph moves the window itself and reads only rows that it has written. Therefore there is no last position,
 * and a reset does not have to clear the buffers. The inputs and outputs of the graph are described in docs/export/bundle-format.md.
 */
internal class OnnxRuntime(bundle: Bundle, backend: Backend, private val environment: OrtEnvironment, private val threads: Int) :
    ChunkedRuntime(bundle, backend) {
    private val resources = Resources()
    private var graph: OnnxGraph? = null // null only while another one is opened
    private var graphOf: Adapter? = null // an adapter whose graph is open; it also computes without one
    private val inputs = HashMap<String, OnnxTensor>()
    private val pinned = HashMap<String, OnnxTensor>()
    private val inputPos: LongBuffer = direct(Long.SIZE_BYTES).asLongBuffer()
    private val idBuffer: LongBuffer = direct(Long.SIZE_BYTES * backend.cache.prefillChunk).asLongBuffer()
    private val idTensors = HashMap<Int, OnnxTensor>() // by length: one token, a whole chunk, and the last chunk of a prompt
    private val logitsBuffer: FloatBuffer = direct(Float.SIZE_BYTES * bundle.vocabSize).asFloatBuffer()
    private val logits = FloatArray(bundle.vocabSize)
    private val cache: OnnxCache

    override val library = EngineLibrary("onnxruntime", environment.version)

    override val savedCache: SavedCache get() = BoundCache()

    init {
        try {
            graph = OnnxGraph.open(bundle, backend.program, environment, threads)
            cache = resources.add(OnnxCache(backend.cache, environment))
            bindCache()
            inputs["input_pos"] = resources.add(OnnxTensor.createTensor(environment, inputPos, longArrayOf(1)))
            pinned["logits"] = resources.add(
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
        val session = graph?.session ?: throw BundleException("${bundle.folder} has no open graph; open the bundle again")
        session.run(inputs, emptySet(), pinned).close() // this leaves the pinned outputs open
    }

    /**
     * The window is contiguous. When a layer of C slots is full, the rows before its window of W move out, C - W + 1 at a time. Rows are
     * where they were if as many moves lie before both positions.
     */
    override fun holds(position: Int, written: Int): Boolean = backend.cache.slots.zip(backend.cache.windows).all { (slots, window) ->
        val step = slots - window + 1
        fun moves(total: Int) = (maxOf(0, total - slots) + step - 1) / step
        moves(position) == moves(written)
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
            pinned["present.$name"] = tensor
        }
    }

    /** The types and shapes that a graph of this bundle must have. */
    private fun contract(): Map<String, Pair<OnnxJavaType, LongArray>> {
        val bound = inputs.filterKeys { !isFactor(it) } + pinned
        return bound.mapValues { (_, tensor) -> tensor.info.type to tensor.info.shape } +
            ("input_ids" to (OnnxJavaType.INT64 to longArrayOf(1, OnnxGraph.ANY)))
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
    }
}
