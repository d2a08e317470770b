package gemma.edge

import gemma.edge.engine.sha256
import java.io.File
import java.time.Instant
import java.time.temporal.ChronoUnit
import kotlin.random.Random

/**
 * The settings of a benchmark.
 *
 * @property backend the backend to measure; null takes the first one that has an engine on the class path.
 * @property threads number of threads; null takes one per big core, but no more than the bundle's target has.
 * @property prefill number of tokens in the prompt.
 * @property decode number of tokens to generate after the prompt.
 * @property repeat number of repetitions that are measured.
 * @property warmup number of repetitions before them that are not measured.
 * @property minutes the benchmark keeps repeating until this many minutes have passed.
 * @throws InputException a number is out of range.
 */
public data class BenchmarkSettings(
    public val threads: Int? = null,
    public val prefill: Int = 128,
    public val decode: Int = 64,
    public val repeat: Int = 5,
    public val warmup: Int = 1,
    public val minutes: Double = 0.0,
    public val backend: String? = null,
) {
    init {
        if (prefill < 1 || decode < 1 || repeat < 1) throw InputException("prefill $prefill, decode $decode and repeat $repeat must be at least 1")
        if (warmup < 0 || !(minutes >= 0)) throw InputException("warmup $warmup and minutes $minutes must not be below 0")
    }
}

/**
 * Measures a bundle as gemma-bench does and writes the same JSON (docs/benchmarking.md). The model is loaded once. Each repetition
 * feeds a prompt of random tokens and generates greedily after it. The document holds every repetition and the latency of every
 * token; nothing is averaged.
 */
public class Benchmark(private val system: BenchmarkSystem = BenchmarkSystem()) {
    /**
     * Run the benchmark. This takes minutes, so do not call it on a main thread. Interrupting the thread ends it.
     *
     * @param folder the bundle's folder.
     * @param progress called after each repetition with the number of repetitions so far, warm-ups included. It may throw to end the
     *   benchmark.
     * @return the JSON document. If the bundle cannot be measured, the document says why in `failure`.
     */
    public fun run(folder: File, settings: BenchmarkSettings, progress: (done: Int) -> Unit = {}): String {
        val before = system.state()
        val result = linkedMapOf<String, Any?>(
            "tool" to TOOL,
            "started" to Instant.now().truncatedTo(ChronoUnit.SECONDS).toString().replace("Z", "+00:00"),
            "model" to mapOf("name" to folder.name, "backend" to (settings.backend ?: "")),
            "settings" to described(settings, settings.threads ?: 0),
            "device" to system.device(),
        )
        try {
            result += measure(folder, settings, progress)
            result["failure"] = ""
        } catch (error: GemmaException) {
            result["failure"] = error.message
        } catch (error: OutOfMemoryError) {
            result["failure"] = "the Java heap is full: ${error.message}"
        }
        result["state"] = mapOf("before" to before, "after" to system.state())
        return toJson(mapOf("schema_version" to SCHEMA_VERSION, "results" to listOf(result))) + "\n"
    }

    private fun measure(folder: File, settings: BenchmarkSettings, progress: (Int) -> Unit): Map<String, Any?> {
        val bundle = Bundle.open(folder)
        val threads = settings.threads ?: Device.current().threadsFor(bundle)
        val start = System.nanoTime()
        return GemmaRuntime.open(bundle, settings.backend, threads).use { runtime ->
            val loadS = secondsSince(start)
            val loadedMib = system.residentMib()
            val times = Times(start)
            val random = Random(0)
            val memory = ArrayList<List<Double?>>()
            var number = -settings.warmup
            while (number < settings.repeat || secondsSince(start) < 60 * settings.minutes) {
                if (Thread.interrupted()) throw InterruptedException("the benchmark was interrupted")
                val ids = IntArray(settings.prefill) { random.nextInt(bundle.vocabSize) }
                repeat(runtime, ids, settings.decode, if (number < 0) null else times)
                memory += listOf(secondsSince(start), system.residentMib())
                number++
                progress(number + settings.warmup)
            }
            times.lists + mapOf(
                "model" to describe(bundle, runtime.backend, settings),
                "settings" to described(settings, threads),
                "versions" to mapOf("gemma-edge" to VERSION, runtime.library.name to versionOf(runtime)),
                "load" to mapOf("warm_s" to loadS),
                "memory" to mapOf(
                    "loaded_mib" to loadedMib,
                    "end_mib" to system.residentMib(),
                    "peak_mib" to system.peakMib(),
                    "pss_mib" to system.pssMib(),
                    "samples" to memory,
                ).filterValues { it != null },
            )
        }
    }

    private fun versionOf(runtime: GemmaRuntime): String =
        runtime.library.version.ifEmpty { system.libraryVersion(runtime.backend.name) ?: "unknown" }

    /** Feed a prompt into an empty cache and generate after it; [times] is null for a warm-up. */
    private fun repeat(runtime: GemmaRuntime, ids: IntArray, decode: Int, times: Times?) {
        runtime.reset()
        val start = System.nanoTime()
        var logits = runtime.prefill(ids)
        val prefilled = System.nanoTime()
        var token = logits.indexOfLargest()
        val ticks = LongArray(decode + 1)
        ticks[0] = System.nanoTime()
        for (i in 1..decode) {
            logits = runtime.decode(token)
            token = logits.indexOfLargest()
            ticks[i] = System.nanoTime()
        }
        times?.add(start, prefilled, ticks)
    }

    private fun describe(bundle: Bundle, backend: Backend, settings: BenchmarkSettings): Map<String, Any> {
        val depth = settings.prefill + settings.decode / 2
        return mapOf(
            "name" to bundle.folder.name,
            "backend" to backend.name,
            "bytes" to backend.bytes,
            "manifest_sha256" to sha256 { update(File(bundle.folder, Bundle.MANIFEST).readBytes()) },
            "context" to backend.cache.context,
            "read_bytes_per_token" to backend.weightBytes + backend.cache.bytesSeen(depth),
        )
    }

    private fun described(settings: BenchmarkSettings, threads: Int) = mapOf(
        "threads" to threads,
        "prefill" to settings.prefill,
        "decode" to settings.decode,
        "repeat" to settings.repeat,
        "warmup" to settings.warmup,
        "minutes" to settings.minutes,
    )

    /** The times of all repetitions: keys that end in `_s` are seconds, `decode_ms` is milliseconds. */
    private class Times(private val origin: Long) {
        val lists = listOf("prefill_s", "ttft_s", "decode_s", "decode_ms", "decode_at_s").associateWith { ArrayList<Any>() }

        fun add(start: Long, prefilled: Long, ticks: LongArray) {
            lists.getValue("prefill_s").add((prefilled - start) / 1e9)
            lists.getValue("ttft_s").add((ticks[0] - start) / 1e9)
            lists.getValue("decode_s").add((ticks.last() - ticks[0]) / 1e9)
            lists.getValue("decode_ms").add((1 until ticks.size).map { (ticks[it] - ticks[it - 1]) / 1e6 })
            lists.getValue("decode_at_s").add((ticks[0] - origin) / 1e9)
        }
    }

    public companion object {
        /** The version of this library. */
        public const val VERSION: String = "0.1.0"
        private const val TOOL = "gemma-edge-android"
        private const val SCHEMA_VERSION = 1

        private fun secondsSince(start: Long) = (System.nanoTime() - start) / 1e9

        /** Run a benchmark without the app: `Benchmark BUNDLE RESULT.json THREADS PREFILL DECODE REPEAT WARMUP MINUTES [BACKEND]`. */
        @JvmStatic
        public fun main(args: Array<String>) {
            val (threads, prefill, decode, repeat, warmup) = args.slice(2..6).map { it.toInt() }
            val settings = BenchmarkSettings(threads, prefill, decode, repeat, warmup, args[7].toDouble(), args.getOrNull(8))
            writeWhole(File(args[1]), Benchmark().run(File(args[0]), settings))
        }

        /** Write a file in one step, so that nobody can read an unfinished one. */
        public fun writeWhole(file: File, text: String) {
            val partial = File(file.parentFile, ".${file.name}.partial")
            partial.writeText(text)
            check(partial.renameTo(file)) { "cannot write $file" }
        }
    }
}
