package gemma.edge.engine

import gemma.edge.Backend
import gemma.edge.Benchmark
import gemma.edge.Bundle
import gemma.edge.CPU
import gemma.edge.GPU
import gemma.edge.GemmaRuntime
import gemma.edge.UnsupportedException
import java.io.File

/** What only the modules with engines use. It may change between two releases. */
@RequiresOptIn("This is for the modules with engines, and may change between two releases.")
@Retention(AnnotationRetention.BINARY)
@Target(AnnotationTarget.CLASS, AnnotationTarget.CONSTRUCTOR, AnnotationTarget.FUNCTION, AnnotationTarget.PROPERTY)
public annotation class EngineApi

/** Opens bundles with one library for inference. Each module with an engine has one class of this kind, with a constructor without parameters. */
@EngineApi
public interface Engine {
    /** Load a backend of a bundle whose memory fits. This takes seconds. */
    public fun open(bundle: Bundle, backend: Backend, options: EngineOptions): GemmaRuntime
}

/**
 * How a bundle is opened.
 *
 * @property threads number of threads.
 * @property cacheDir folder for files that make the next start faster; null keeps none.
 * @property accelerator what computes: `cpu`, or what the backend was made for where its engine can use that.
 */
@EngineApi
public class EngineOptions(public val threads: Int, public val cacheDir: File?, public val accelerator: String = CPU)

/** The refusal of a device for which a library for inference has no native part; [name] is the library's. */
@EngineApi
public fun noNativeLibrary(name: String, error: LinkageError): UnsupportedException = UnsupportedException(
    "$name has no native library for ${System.getProperty("os.arch")} here (${error.message?.lines()?.first()}); " +
        "use a device with arm64-v8a or x86_64",
)

/**
 * A library for inference, and its version if it tells one.
 *
 * @property name the library's name in the results of benchmarks.
 * @property version its version; empty if it does not tell.
 */
public class EngineLibrary @EngineApi constructor(public val name: String, public val version: String)

/** The engines of this library: which backend each runs, and which dependency brings it to the class path. */
@OptIn(EngineApi::class)
internal enum class Engines(val backend: String, private val className: String, val dependency: String, val accelerators: List<String> = listOf(CPU)) {
    // this is the order in which the backends of a bundle are tried, the fastest first
    EXECUTORCH("executorch", "gemma.edge.executorch.ExecuTorchEngine", "gemma.edge:gemma-executorch"),
    LITERT("tflite", "gemma.edge.litert.LiteRtEngine", "gemma.edge:gemma-litert", listOf(CPU, GPU)),
    ONNX("onnx", "gemma.edge.onnx.OnnxEngine", "gemma.edge:gemma-onnx"),
    ;

    /** The engine; null if its module is not on the class path. The consumer rules of each module keep its class from R8. */
    fun find(): Engine? = try {
        Class.forName(className).getDeclaredConstructor().newInstance() as Engine
    } catch (_: ClassNotFoundException) {
        null
    }

    companion object {
        fun of(backend: String): Engines? = entries.firstOrNull { it.backend == backend }

        /**
         * The backend that runs a bundle, and its engine: the requested backend, or the first one that has an engine here.
         *
         * @throws UnsupportedException the bundle does not hold it, or its engine is not on the class path.
         */
        fun choose(bundle: Bundle, requested: String?): Pair<Backend, Engine> {
            val held = bundle.backendNames.joinToString()
            if (requested != null && requested !in bundle.backendNames) {
                throw UnsupportedException("${bundle.folder} holds no '$requested' backend, only $held; export with --backend $requested")
            }
            val candidates = entries.filter { if (requested == null) it.backend in bundle.backendNames else it.backend == requested }
            for (candidate in candidates) candidate.find()?.let { return bundle.backend(candidate.backend) to it }
            if (candidates.isEmpty()) {
                val known = entries.joinToString { it.backend }
                throw UnsupportedException("${bundle.folder} holds ${requested ?: held}; this library runs $known; export with --backend onnx")
            }
            throw UnsupportedException(
                "no engine for ${bundle.folder}, which holds $held; add one of these dependencies to your app: " +
                    candidates.joinToString { "${it.dependency}:${Benchmark.VERSION} for ${it.backend}" },
            )
        }

        /**
         * What computes a backend: the requested accelerator, or what it was made for. The CPU also computes what was made for a GPU.
         *
         * @throws UnsupportedException the backend was made for another accelerator, or its engine cannot use it.
         */
        fun accelerator(bundle: Bundle, backend: Backend, requested: String?): String {
            val known = of(backend.name)?.accelerators ?: listOf(CPU)
            val chosen = requested ?: backend.accelerator
            val made = "${bundle.folder}: its ${backend.name} backend was made for the accelerator ${backend.accelerator}"
            if (backend.accelerator !in known) {
                throw UnsupportedException("$made; this library runs such bundles for ${known.joinToString(" and ")}; export it without --accelerator")
            }
            if (chosen != CPU && chosen != backend.accelerator) {
                throw UnsupportedException("$made, not for $chosen; export it with --accelerator $chosen, or open it for the $CPU")
            }
            return chosen
        }
    }
}
