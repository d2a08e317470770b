// ONLY TO COMPILE AGAINST AND FOR TESTS: as much of LiteRT's Kotlin API as gemma-litert calls, with LiteRT's names and signatures.
// Google's classes and their native code come in com.google.ai.edge.litert:litert. The native code of this double is litert_glue.c, which
// `make android-native-test` builds; it calls the C API in Android's own LiteRT.
package com.google.ai.edge.litert

public class LiteRtException(message: String) : Exception(message)

public abstract class JniHandle internal constructor(internal val handle: Long) : AutoCloseable {
    private var closed = false

    protected abstract fun destroy()

    override fun close() {
        if (!closed) destroy()
        closed = true
    }
}

public enum class Accelerator { NONE, CPU, GPU, NPU }

public class TensorType(public val elementType: ElementType, public val layout: Layout?) {
    public enum class ElementType { INT, FLOAT, INT8, BOOLEAN }

    public class Layout(public val dimensions: IntArray)
}

public class Environment private constructor(handle: Long) : JniHandle(handle) {
    override fun destroy(): Unit = Native.destroy("Environment", handle)

    public enum class Option

    public companion object {
        @JvmStatic
        public fun create(options: Map<Option, String>): Environment = Environment(Native.environment().also { check(options.isEmpty()) })
    }
}

public class Model private constructor(handle: Long) : JniHandle(handle) {
    override fun destroy(): Unit = Native.destroy("Model", handle)

    public fun getInputTensorType(inputName: String, signature: String?): TensorType = type(inputName, signature, true)

    public fun getOutputTensorType(outputName: String, signature: String?): TensorType = type(outputName, signature, false)

    private fun type(name: String, signature: String?, input: Boolean): TensorType {
        val shape = Native.shape(handle, signature!!, name, input)
        return TensorType(if (shape[0] == 1) TensorType.ElementType.FLOAT else TensorType.ElementType.INT, TensorType.Layout(shape.copyOfRange(1, shape.size)))
    }

    public companion object {
        @JvmStatic
        public fun load(filePath: String): Model = Model(Native.load(filePath))
    }
}

public class CompiledModel private constructor(handle: Long, private val model: Model, private val env: Environment) : JniHandle(handle) {
    public class CpuOptions(public val numThreads: Int?, public val xnnPackFlags: Int?, public val xnnPackWeightCachePath: String?)

    public class GpuOptions(internal val constantTensorSharing: Boolean?, internal val precision: Precision?) {
        public enum class Precision { DEFAULT, FP16, FP32 }
    }

    public class Options(public vararg val accelerators: Accelerator) {
        public var cpuOptions: CpuOptions? = null
        public var gpuOptions: GpuOptions? = null
    }

    override fun destroy(): Unit = Native.destroy("CompiledModel", handle)

    public fun createInputBuffer(inputName: String, signature: String?): TensorBuffer = buffer(inputName, signature, true)

    public fun createOutputBuffer(outputName: String, signature: String?): TensorBuffer = buffer(outputName, signature, false)

    private fun buffer(name: String, signature: String?, input: Boolean) =
        TensorBuffer(Native.buffer(env.handle, model.handle, handle, signature!!, name, input))

    public fun run(inputs: Map<String, TensorBuffer>, outputs: Map<String, TensorBuffer>, signature: String?) {
        fun handles(of: Map<String, TensorBuffer>, input: Boolean) =
            Native.names(model.handle, signature!!, input).map { of.getValue(it).handle }.toLongArray()
        Native.run(model.handle, handle, signature!!, handles(inputs, true), handles(outputs, false))
    }

    public companion object {
        @JvmStatic
        public fun create(model: Model, options: Options, optionalEnv: Environment?): CompiledModel {
            val cpu = options.cpuOptions
            val accelerator = options.accelerators.single()
            check(accelerator == Accelerator.CPU || options.gpuOptions?.precision == GpuOptions.Precision.FP32)
            val handle = Native.compile(optionalEnv!!.handle, model.handle, 1 shl accelerator.ordinal - 1, cpu?.numThreads ?: 1, cpu?.xnnPackWeightCachePath)
            return CompiledModel(handle, model, optionalEnv)
        }
    }
}

public class TensorBuffer internal constructor(handle: Long) : JniHandle(handle) {
    override fun destroy(): Unit = Native.destroy("TensorBuffer", handle)

    public fun writeInt(data: IntArray): Unit = Native.copy(handle, data, 4L * data.size, true)

    public fun writeFloat(data: FloatArray): Unit = Native.copy(handle, data, 4L * data.size, true)

    public fun readInt(): IntArray = IntArray((Native.size(handle) / 4).toInt()).also { Native.copy(handle, it, 4L * it.size, false) }

    public fun readFloat(): FloatArray = FloatArray((Native.size(handle) / 4).toInt()).also { Native.copy(handle, it, 4L * it.size, false) }
}

/** The functions of litert_glue.c. */
internal object Native {
    init {
        System.loadLibrary("litert_jni")
    }

    @JvmStatic external fun environment(): Long

    @JvmStatic external fun load(path: String): Long

    @JvmStatic external fun compile(environment: Long, model: Long, accelerators: Int, threads: Int, weightCache: String?): Long

    @JvmStatic external fun names(model: Long, signature: String, input: Boolean): Array<String>

    /** The element type, which is 1 for float32, and the sizes. */
    @JvmStatic external fun shape(model: Long, signature: String, name: String, input: Boolean): IntArray

    @JvmStatic external fun buffer(environment: Long, model: Long, compiled: Long, signature: String, name: String, input: Boolean): Long

    @JvmStatic external fun run(model: Long, compiled: Long, signature: String, inputs: LongArray, outputs: LongArray)

    @JvmStatic external fun copy(buffer: Long, array: Any, bytes: Long, write: Boolean)

    @JvmStatic external fun size(buffer: Long): Long

    @JvmStatic external fun destroy(kind: String, handle: Long)
}
