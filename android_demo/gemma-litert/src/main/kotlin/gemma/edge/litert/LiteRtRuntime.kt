package gemma.edge.litert

import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.Environment
import com.google.ai.edge.litert.LiteRtException
import com.google.ai.edge.litert.Model
import com.google.ai.edge.litert.TensorBuffer
import gemma.edge.Backend
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.GemmaRuntime
import gemma.edge.Signature
import gemma.edge.UnsupportedException
import gemma.edge.engine.ChunkedRuntime
import gemma.edge.engine.Engine
import gemma.edge.engine.EngineLibrary
import gemma.edge.engine.EngineOptions
import gemma.edge.engine.ProgramFile
import gemma.edge.engine.Resources
import gemma.edge.engine.SavedCache
import gemma.edge.engine.noNativeLibrary

/** LiteRT, through its Kotlin API. */
public class LiteRtEngine : Engine {
    override fun open(bundle: Bundle, backend: Backend, options: EngineOptions): GemmaRuntime {
        checkModel(ProgramFile(bundle, backend))
        try {
            if (options.accelerator == "gpu") return LiteRtRuntime(bundle, backend, options.threads, null, Accelerator.GPU)
            return packedWeights(bundle, backend, options.cacheDir).use { weights -> LiteRtRuntime(bundle, backend, options.threads, weights.path) }
        } catch (error: LinkageError) {
            throw noNativeLibrary("LiteRT", error)
        }
    }
}

/**
 * Runs a bundle's TFLite backend on the CPU or the GPU. Each tensor of the cache is one buffer that is input and output of every signature, so the
 * model updates it in place. Each slot of a cache knows its position, so a reset clears nothing: tokens from position 0 on make the model
 * forget the rest. The model is described in docs/export/tflite.md; [Signatures] chooses what is fed to which signature.
 */
internal class LiteRtRuntime(
    bundle: Bundle,
    backend: Backend,
    threads: Int,
    packedWeights: String?,
    private val accelerator: Accelerator = Accelerator.CPU,
) : ChunkedRuntime(bundle, backend) {
    private val path = bundle.file(backend.program)
    private val resources = Resources()
    private val signatures = Signatures(backend.signatures)
    private val model: CompiledModel
    private val cache: LiteRtCache
    private val inputs = HashMap<String, Map<String, TensorBuffer>>() // by signature
    private val outputs = HashMap<String, Map<String, TensorBuffer>>()
    private var logits = FloatArray(0)

    /** What the logits are before a call: a call that failed without an error leaves them so. */
    private val unknown = FloatArray(bundle.vocabSize) { Float.NaN }

    override val library = EngineLibrary("litert", "")

    override val savedCache: SavedCache get() = cache

    override val atOnce: Int get() = Int.MAX_VALUE // `forward` splits by itself

    init {
        var complete = false
        try {
            val environment = resources.add(Environment.create(emptyMap()))
            val file = resources.add(Model.load(path.path))
            for (signature in backend.signatures) checkContract(file, signature)
            model = resources.add(compiled(file, environment, threads, packedWeights))
            cache = LiteRtCache(backend.cache) { resources.add(model.createInputBuffer(it, backend.signatures.first().name)) }
            bindBuffers()
            complete = true
        } catch (error: LiteRtException) {
            throw BundleException("$path is damaged or is not the model of this bundle: ${error.message}; import the bundle again", error)
        } finally {
            if (!complete) free()
        }
    }

    /** The model for its accelerator alone: where a part of it would have to be computed elsewhere, LiteRT gives an error. */
    private fun compiled(file: Model, environment: Environment, threads: Int, packedWeights: String?): CompiledModel {
        val options = CompiledModel.Options(accelerator)
        if (accelerator == Accelerator.CPU) {
            options.cpuOptions = CompiledModel.CpuOptions(threads, null, packedWeights)
            return CompiledModel.create(file, options, environment)
        }
        try {
            options.gpuOptions = inFloat32()
            return CompiledModel.create(file, options, environment)
        } catch (error: LiteRtException) {
            throw UnsupportedException("LiteRT cannot run $path on a GPU of this device (${error.message}); open it with accelerator = \"cpu\"")
        }
    }

    override fun forward(ids: IntArray, start: Int, end: Int) {
        try {
            for (call in signatures.calls(position, end - start, pinned)) {
                cache.mark(if (position + call.start >= pinned) pinned else 0)
                run(call, ids, start)
            }
        } catch (error: LiteRtException) {
            throw BundleException("$path does not run: ${error.message}; import the bundle again", error)
        }
    }

    override fun logits(): FloatArray = logits

    override fun free() = resources.close()

    /** A chunk less one token of slots lies behind the ring, and the last call may have written as much padding over old keys. */
    override fun holds(position: Int, written: Int): Boolean =
        position == written || super.holds(position, written + 2 * (backend.cache.prefillChunk - 1))

    private fun run(call: Call, ids: IntArray, start: Int) {
        val name = call.signature.name
        val from = inputs.getValue(name)
        val to = outputs.getValue(name)
        from.getValue("tokens").writeInt(IntArray(call.signature.tokens) { if (it < call.count) ids[start + call.start + it] else 0 })
        from.getValue("input_pos").writeInt(IntArray(call.signature.tokens) { if (it < call.count) position + call.start + it else PADDING })
        val last = to["logits"]
        last?.writeFloat(unknown)
        model.run(from, to, name)
        if (last == null) return
        logits = last.readFloat()
        if (logits.any { it.isNaN() }) throw BundleException("$path does not run: $name gave no logits; import the bundle again")
    }

    private fun bindBuffers() {
        val caches = cache.buffers
        for (signature in backend.signatures) {
            val name = signature.name
            inputs[name] = caches + listOf("tokens", "input_pos").associateWith { resources.add(model.createInputBuffer(it, name)) }
            outputs[name] = if (signature.prefills) caches else caches + ("logits" to resources.add(model.createOutputBuffer("logits", name)))
        }
    }

    /** Compare the shapes of a signature with the manifest. */
    private fun checkContract(file: Model, signature: Signature) {
        val named = mapOf("tokens" to listOf(1, signature.tokens), "input_pos" to listOf(signature.tokens)) +
            LiteRtCache.shapesOf(backend.cache)
        for ((key, shape) in named) check(signature, key, shape, sizesOf(file.getInputTensorType(key, signature.name).layout))
        if (signature.prefills) return
        check(signature, "logits", listOf(1, signature.tokens, bundle.vocabSize), sizesOf(file.getOutputTensorType("logits", signature.name).layout))
    }

    private fun check(signature: Signature, key: String, expected: List<Int>, actual: List<Int>?) {
        if (actual == expected) return
        throw BundleException("$path: $key of ${signature.name} is $actual, the manifest says $expected; export the bundle again")
    }

    private companion object {
        // PADDING: the position of a token that fills up a call.
        const val PADDING = -1
    }
}

/**
 * In 16 bits the angles of rotary embeddings go wrong, the more the later the position. Releases of LiteRT differ in the other options,
 * which stay at their defaults, so the constructor is found by the type of this one.
 */
internal fun inFloat32(): CompiledModel.GpuOptions {
    val precision = CompiledModel.GpuOptions.Precision::class.java
    val constructor = CompiledModel.GpuOptions::class.java.constructors.first { precision in it.parameterTypes && it.parameterTypes.none(Class<*>::isPrimitive) }
    val arguments = constructor.parameterTypes.map { if (it == precision) CompiledModel.GpuOptions.Precision.FP32 else null }
    return constructor.newInstance(*arguments.toTypedArray()) as CompiledModel.GpuOptions
}
