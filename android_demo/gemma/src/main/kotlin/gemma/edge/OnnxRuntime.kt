package gemma.edge

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import gemma.edge.onnx.OnnxCache
import gemma.edge.onnx.direct
import gemma.edge.onnx.endAt
import gemma.edge.onnx.goTo
import gemma.edge.state.StateFile
import gemma.edge.state.StateHeader
import gemma.edge.state.StateTensor
import gemma.edge.text.IntList
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * Runs a bundle's ONNX backend on the CPU. Every tensor of the cache is both an input and a pinned output of a step, so the graph
 * updates it in place. The graph moves the window itself and reads only rows that it has written. Therefore there is no last position,
 * and a reset does not have to clear the buffers. The inputs and outputs of the graph are described in docs/export/bundle-format.md.
 */
public class OnnxRuntime private constructor(override val bundle: Bundle, private val environment: OrtEnvironment, threads: Int) :
    GemmaRuntime {
    private val resources = Resources()
    private val session: OrtSession
    private val inputs = HashMap<String, OnnxTensor>()
    private val pinned = HashMap<String, OnnxTensor>()
    private val inputPos: LongBuffer = direct(Long.SIZE_BYTES).asLongBuffer()
    private val idBuffer: LongBuffer = direct(Long.SIZE_BYTES * bundle.cache.prefillChunk).asLongBuffer()
    private val idTensors = HashMap<Int, OnnxTensor>() // by length: one token, a whole chunk, and the last chunk of a prompt
    private val logitsBuffer: FloatBuffer = direct(Float.SIZE_BYTES * bundle.vocabSize).asFloatBuffer()
    private val logits = FloatArray(bundle.vocabSize)
    private val cache: OnnxCache
    private val kept = IntList(keep = maxOf(MIN_KEPT_IDS, bundle.cache.reach + bundle.cache.context))
    private var written = 0 // highest position written so far; larger than `position` after loading a state that was rewound
    private var closed = false

    override var position: Int = 0
        private set

    override val ids: IntArray
        @Synchronized get() = kept.toArray()

    init {
        try {
            session = resources.add(open(bundle.generateGraph, threads))
            cache = resources.add(OnnxCache(bundle.cache, environment))
            bindCache()
            inputs["input_pos"] = resources.add(OnnxTensor.createTensor(environment, inputPos, longArrayOf(1)))
            pinned["logits"] = resources.add(
                OnnxTensor.createTensor(environment, logitsBuffer, longArrayOf(1, 1, bundle.vocabSize.toLong())),
            )
            checkContract()
        } catch (error: OrtException) {
            resources.close()
            throw BundleException("${bundle.generateGraph} is damaged or is not the graph of this bundle: ${error.message}", error)
        } catch (error: GemmaException) {
            resources.close()
            throw error
        }
    }

    @Synchronized
    override fun prefill(ids: IntArray): FloatArray {
        check(ids)
        for (start in ids.indices step bundle.cache.prefillChunk) {
            step(ids, start, minOf(start + bundle.cache.prefillChunk, ids.size))
        }
        return logits()
    }

    @Synchronized
    override fun decode(token: Int): FloatArray {
        val ids = intArrayOf(token)
        check(ids)
        step(ids, 0, 1)
        return logits()
    }

    @Synchronized
    override fun reset() {
        position = 0 // from here on, no row of the cache is read before it is written
        written = 0
        kept.clear()
    }

    @Synchronized
    override fun save(file: File, notes: String) {
        check(!closed) { "the runtime was closed" }
        val last = kept.toArray()
        val tensors = listOf(StateTensor(StateFile.IDS, "I32", listOf(last.size))) + cache.saved(written)
        StateFile.write(file, StateHeader(bundle.identity, position, written, notes), tensors) { tensor ->
            if (tensor.name == StateFile.IDS) listOf(bytesOf(last)) else cache.rows(tensor)
        }
    }

    @Synchronized
    override fun load(file: File): String {
        check(!closed) { "the runtime was closed" }
        StateFile.open(file).use { state ->
            val header = state.header
            val identity = bundle.identity
            if (header.identity != identity) {
                throw StateException(
                    "$file belongs to another bundle or backend (${header.identity.take(16)}...; this one is ${identity.take(16)}...); " +
                        "feed its text again",
                )
            }
            val last = idsIn(state)
            val expected = cache.saved(header.written)
            val saved = state.tensors.filter { it.name != StateFile.IDS }
            val different = (saved - expected.toSet() + (expected - saved.toSet())).firstOrNull()
            if (different != null) throw StateException("$file is damaged: ${different.name} is not what this bundle has; save it again")
            var complete = false
            try {
                cache.fill(expected, state::read)
                complete = true
            } catch (error: JsonException) {
                throw StateException("$file is damaged (${error.message}); save it again", error)
            } finally {
                bindCache()
                if (!complete) reset() // the contents of the cache are unknown
            }
            kept.clear()
            kept.addAll(last)
            position = header.position
            written = header.written
            return header.notes
        }
    }

    /** Free the model's memory. If another thread is in a step, this waits until the step ends. */
    @Synchronized
    override fun close() {
        if (closed) return
        closed = true
        idTensors.values.forEach { it.close() }
        resources.close()
    }

    private fun check(ids: IntArray) {
        check(!closed) { "the runtime was closed" }
        if (ids.isEmpty()) throw InputException("there is no token to feed; give at least one token id")
        val bad = ids.firstOrNull { it !in 0 until bundle.vocabSize }
        if (bad != null) throw InputException("token id $bad is not below the vocabulary size ${bundle.vocabSize}")
    }

    private fun step(tokens: IntArray, start: Int, end: Int) {
        for (i in start until end) idBuffer.put(i - start, tokens[i].toLong())
        inputPos.put(0, position.toLong())
        inputs["input_ids"] = idTensor(end - start)
        session.run(inputs, emptySet(), pinned).close() // this leaves the pinned outputs open
        position += end - start
        written = maxOf(written, position)
        for (i in start until end) kept.add(tokens[i])
    }

    private fun idsIn(state: StateFile): IntArray {
        val tensor = state.tensors.firstOrNull { it.name == StateFile.IDS && it.dtype == "I32" && it.shape.size == 1 }
        val ids = tensor?.let { IntArray(it.shape[0]).also { ids -> state.read(tensor).asIntBuffer().get(ids) } }
        val position = state.header.position
        if (ids == null || ids.size > position || (position > 0 && ids.isEmpty()) || ids.any { it !in 0 until bundle.vocabSize }) {
            throw StateException("the state is damaged: its token ids do not lead to position $position; save it again")
        }
        return ids
    }

    private fun bytesOf(ids: IntArray): ByteBuffer {
        val bytes = ByteBuffer.allocate(Int.SIZE_BYTES * ids.size).order(ByteOrder.LITTLE_ENDIAN)
        bytes.asIntBuffer().put(ids)
        return bytes
    }

    /** A tensor of the first [length] ids; the tensors of all lengths share one buffer. */
    private fun idTensor(length: Int): OnnxTensor = idTensors.getOrPut(length) {
        val rare = idTensors.keys.filter { it != 1 && it != bundle.cache.prefillChunk }
        rare.forEach { idTensors.remove(it)?.close() }
        val first = idBuffer.slice().also { it.endAt(length) }
        OnnxTensor.createTensor(environment, first, longArrayOf(1, length.toLong()))
    }

    private fun logits(): FloatArray {
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
        val graph = bundle.generateGraph
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

    /** Resources that are closed together, in the reverse order of their creation. */
    private class Resources : AutoCloseable {
        private val open = ArrayList<AutoCloseable>()

        fun <T : AutoCloseable> add(resource: T): T = resource.also { open.add(it) }

        override fun close() = open.asReversed().forEach { it.close() }
    }

    public companion object {
        // ANY: a size that the graph does not fix.
        private const val ANY = -1L

        // MIN_KEPT_IDS: how many of the last token ids are kept at least, as in the Python runtime.
        private const val MIN_KEPT_IDS = 1 shl 13

        // ENVIRONMENT_STACK: stack of the thread that starts ONNX Runtime, in bytes.
        private const val ENVIRONMENT_STACK = 16L shl 20

        /**
         * Load a bundle. This takes seconds, so do not call it on a main thread.
         *
         * @param threads number of threads; null takes one per big core, but no more than the bundle's target has.
         * @param device the device, whose free memory is compared with the bundle's plan before anything is loaded.
         * @throws BundleException the files are not what the manifest says.
         * @throws NotEnoughMemoryException the device has too little free memory.
         * @throws UnsupportedException ONNX Runtime does not run on this device.
         * @throws InputException [threads] is below 1.
         */
        public fun open(bundle: Bundle, threads: Int? = null, device: Device = Device.current()): OnnxRuntime {
            if (threads != null && threads < 1) throw InputException("threads $threads is below 1")
            device.requireMemoryFor(bundle)
            return OnnxRuntime(bundle, environment(), threads ?: device.threadsFor(bundle))
        }

        private fun environment(): OrtEnvironment {
            var made: Result<OrtEnvironment>? = null
            // while it looks for devices, ONNX Runtime matches regular expressions recursively; on one machine that was 12,000 frames
            // deep, too deep for a stack of 1 MiB
            val thread = Thread(null, { made = runCatching { OrtEnvironment.getEnvironment() } }, "onnxruntime", ENVIRONMENT_STACK)
            thread.start()
            thread.join()
            val environment = made!!.getOrElse { error ->
                if (error !is LinkageError) throw error
                throw UnsupportedException(
                    "ONNX Runtime has no native library for ${System.getProperty("os.arch")} here (${error.message}); " +
                        "use a device with arm64-v8a or x86_64",
                )
            }
            return environment.also { it.setTelemetry(false) }
        }
    }
}
