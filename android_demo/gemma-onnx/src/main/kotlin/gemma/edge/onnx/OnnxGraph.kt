package gemma.edge.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import gemma.edge.Adapter
import gemma.edge.AdapterException
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.engine.Factor
import gemma.edge.engine.direct
import gemma.edge.engine.endAt
import gemma.edge.engine.goTo
import gemma.edge.engine.isFactor
import gemma.edge.engine.sha256
import java.io.File
import java.io.IOException
import java.nio.ByteOrder

/** An open graph: the bundle's own, or an adapter's, which has inputs for factors and finds its weights in the bundle. */
internal class OnnxGraph private constructor(
    private val path: File,
    private val environment: OrtEnvironment,
    val session: OrtSession,
    val digest: String, // of an adapter's graph; empty for the bundle's own
) : AutoCloseable {
    private val factors = HashMap<String, OnnxTensor>()

    /** Factors of rank 0: the product with them is zero. They do not change, so all adapters share them. */
    private val nothing: Map<String, OnnxTensor> = session.inputInfo.filterKeys(::isFactor).mapValues { (_, node) ->
        OnnxTensor.createTensor(environment, direct(0).asFloatBuffer(), (node.info as TensorInfo).shape.map { maxOf(it, 0) }.toLongArray())
    }

    /** The inputs for factors: those of the adapter that was taken, and nothing for what it does not change. */
    val inputs: Map<String, OnnxTensor> get() = nothing + factors

    /** Give the graph the factors of an adapter, in native memory, or none. */
    fun take(adapter: Adapter?) {
        val taken = HashMap<String, OnnxTensor>()
        var complete = false
        try {
            if (adapter != null) copy(adapter, taken)
            complete = true
        } catch (error: OrtException) {
            throw AdapterException("${adapter?.folder} cannot be used: ${error.message}; make it again with gemma-export adapter", error)
        } finally {
            if (!complete) taken.values.forEach { it.close() }
        }
        factors.values.forEach { it.close() }
        factors.clear()
        factors.putAll(taken)
    }

    private fun copy(adapter: Adapter, taken: MutableMap<String, OnnxTensor>) = NativeTensors(environment, OnnxJavaType.FLOAT).use { memory ->
        // one buffer for all, because the memory of a direct buffer is freed only when the garbage collector finds it
        var buffer = direct(0)
        adapter.forEachFactor { factor ->
            check(adapter, factor)
            val bytes = Float.SIZE_BYTES * factor.values.size
            if (buffer.capacity() < bytes) buffer = direct(bytes)
            buffer.endAt(bytes)
            buffer.goTo(0)
            val part = buffer.slice().order(ByteOrder.nativeOrder())
            part.asFloatBuffer().put(factor.values)
            taken[factor.name] = memory.copyOf(part, factor.shape.map { it.toLong() }.toLongArray())
        }
    }

    private fun check(adapter: Adapter, factor: Factor) {
        val shape = (session.inputInfo[factor.name]?.info as? TensorInfo)?.shape
        val same = shape != null && shape.size == factor.shape.size && shape.indices.all { shape[it] == ANY || shape[it] == factor.shape[it].toLong() }
        if (same) return
        throw AdapterException(
            "${factor.name} of ${adapter.folder} has shape ${factor.shape}, its graph has ${shape?.contentToString()}; " +
                "make it again with gemma-export adapter",
        )
    }

    /** Compare the names, types and shapes of the graph with the manifest's. A buffer of another shape would crash the process. */
    fun checkContract(expected: Map<String, Pair<OnnxJavaType, LongArray>>) {
        val actual = (session.inputInfo + session.outputInfo).filterKeys { !isFactor(it) }.mapValues { it.value.info as? TensorInfo }
        val unmatched = (actual.keys - expected.keys + (expected.keys - actual.keys)).minOrNull()
        if (unmatched != null) {
            throw BundleException("$path is not the graph of this bundle: only one of them has $unmatched; export the bundle again")
        }
        for ((name, typeAndShape) in expected.toSortedMap()) {
            val (type, shape) = typeAndShape
            val info = actual[name]
            val same = info != null && info.type == type && info.shape.size == shape.size &&
                shape.indices.all { info.shape[it] == ANY || shape[it] == ANY || info.shape[it] == shape[it] }
            if (!same) {
                throw BundleException(
                    "$path: $name is ${info?.type} ${info?.shape?.contentToString()}, " +
                        "the manifest says $type ${shape.contentToString()}; export the bundle again",
                )
            }
        }
    }

    override fun close() {
        (nothing.values + factors.values).forEach { it.close() }
        session.close()
    }

    companion object {
        // ANY: a size that the graph does not fix.
        const val ANY = -1L

        // WEIGHTS_IN: ONNX Runtime's key for the folder of the weights of a graph that has no place of its own.
        private const val WEIGHTS_IN = "session.model_external_initializers_file_folder_path"

        /** Open the graph [program] of a bundle. */
        fun open(bundle: Bundle, program: String, environment: OrtEnvironment, threads: Int): OnnxGraph {
            val path = bundle.file(program)
            try {
                val session = options(threads).use { environment.createSession(path.path, it) }
                return OnnxGraph(path, environment, session, "")
            } catch (error: OrtException) {
                throw BundleException("$path is damaged or is not the graph of this bundle: ${error.message}", error)
            }
        }

        /** Open the graph of an adapter of a bundle. */
        fun open(bundle: Bundle, adapter: Adapter, environment: OrtEnvironment, threads: Int): OnnxGraph {
            val path = adapter.graphFile
            try {
                val bytes = path.readBytes()
                if (sha256 { update(bytes) } != adapter.graphDigest) throw AdapterException("$path was changed; import the adapter again")
                val session = options(threads).use { options ->
                    options.addConfigEntry(WEIGHTS_IN, bundle.folder.canonicalPath)
                    environment.createSession(bytes, options)
                }
                return OnnxGraph(path, environment, session, adapter.graphDigest)
            } catch (error: OrtException) {
                throw AdapterException("$path is damaged or is not a graph of this bundle: ${error.message}", error)
            } catch (error: IOException) {
                throw AdapterException("$path cannot be read (${error.message}); import the adapter again", error)
            }
        }

        private fun options(threads: Int) = OrtSession.SessionOptions().also { options ->
            options.setIntraOpNumThreads(threads)
            options.setInterOpNumThreads(1)
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
            // without an arena, activations are freed after each step: less memory at the same speed (runtimes/engines/onnx.py)
            options.setCPUArenaAllocator(false)
            options.setMemoryPatternOptimization(false)
        }
    }
}
