package gemma.edge.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
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
import gemma.edge.engine.StateTensor
import gemma.edge.engine.direct
import gemma.edge.engine.endAt
import gemma.edge.engine.goTo
import gemma.edge.engine.noNativeLibrary
import java.io.File
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
internal class OnnxRuntime(bundle: Bundle, backend: Backend, private val environment: OrtEnvironment, threads: Int) :
    ChunkedRuntime(bundle, backend) {
    private val graph = bundle.file(backend.program)
    private val resources = Resources()
    private val session: OrtSession
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
            session = resources.add(open(graph, threads))
            cache = resources.add(OnnxCache(backend.cache, environment))
            bindCache()
            inputs["input_pos"] = resources.add(OnnxTensor.createTensor(environment, inputPos, longArrayOf(1)))
            pinned["logits"] = resources.add(
                OnnxTensor.createTensor(environment, logitsBuffer, longArrayOf(1, 1, bundle.vocabSize.toLong())),
            )
            checkContract()
        } catch (error: OrtException) {
            resources.close()
            throw BundleException("$graph is damaged or is not the graph of this bundle: ${error.message}", error)
        } catch (error: GemmaException) {
            resources.close()
            throw error
        }
    }

    override fun forward(ids: IntArray, start: Int, end: Int) {
        for (i in start until end) idBuffer.put(i - start, ids[i].toLong())
        inputPos.put(0, position.toLong())
        inputs["input_ids"] = idTensor(end - start)
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
        resources.close()
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

    private fun open(graph: File, threads: Int): OrtSession = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(threads)
        options.setInterOpNumThreads(1)
        options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
        // without an arena, activations are freed after each step: less memory at the same speed (runtimes/engines/onnx.py)
        options.setCPUArenaAllocator(false)
        options.setMemoryPatternOptimization(false)
        environment.createSession(graph.path, options)
    }

    private fun bindCache() {
        for ((name, tensor) in cache.tensors) {
            inputs["past_key_values.$name"] = tensor
            pinned["present.$name"] = tensor
        }
    }

    /** Compare the graph's names, types and shapes with the manifest. A buffer of another shape would crash the process. */
    private fun checkContract() {
        val actual = (session.inputInfo + session.outputInfo).mapValues { it.value.info as? TensorInfo }
        val expected = HashMap<String, Pair<OnnxJavaType, LongArray>>()
        for ((name, tensor) in inputs + pinned) expected[name] = tensor.info.type to tensor.info.shape
        expected["input_ids"] = OnnxJavaType.INT64 to longArrayOf(1, ANY)
        val unmatched = (actual.keys - expected.keys + (expected.keys - actual.keys)).minOrNull()
        if (unmatched != null) {
            throw BundleException("$graph is not the graph of this bundle: only one of them has $unmatched; export the bundle again")
        }
        for ((name, typeAndShape) in expected.toSortedMap()) {
            val (type, shape) = typeAndShape
            val info = actual[name]
            val same = info != null && info.type == type && info.shape.size == shape.size &&
                shape.indices.all { info.shape[it] == ANY || shape[it] == ANY || info.shape[it] == shape[it] }
            if (!same) {
                throw BundleException(
                    "$graph: $name is ${info?.type} ${info?.shape?.contentToString()}, " +
                        "the manifest says $type ${shape.contentToString()}; export the bundle again",
                )
            }
        }
    }

    /** The cache, bound to the session again after its tensors were replaced. */
    private inner class BoundCache : SavedCache by cache {
        override fun fill(saved: List<StateTensor>, read: (StateTensor) -> ByteBuffer) {
            try {
                cache.fill(saved, read)
            } finally {
                bindCache()
            }
        }
    }

    private companion object {
        // ANY: a size that the graph does not fix.
        const val ANY = -1L
    }
}
