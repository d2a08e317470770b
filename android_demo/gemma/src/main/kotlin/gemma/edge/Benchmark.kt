package gemma.edge

import ai.onnxruntime.OrtEnvironment
import java.io.File
import java.security.MessageDigest
import java.time.Instant
import java.time.temporal.ChronoUnit
import kotlin.random.Random

/**
 * What to measure.
 *
 * @property threads null takes one for each big core, at most the target's.
 * @property prefill tokens of the prompt.
 * @property decode tokens generated after it.
 * @property repeat repetitions that count.
 * @property warmup repetitions before them.
 * @property minutes go on repeating for that long.
 */
public data class BenchmarkSettings(
    public val threads: Int? = null,
    public val prefill: Int = 128,
    public val decode: Int = 64,
    public val repeat: Int = 5,
    public val warmup: Int = 1,
    public val minutes: Double = 0.0,
) {
    init {
        if (prefill < 1 || decode < 1 || repeat < 1) throw InputException("prefill $prefill, decode $decode and repeat $repeat must be at least 1")
        if (warmup < 0 || !(minutes >= 0)) throw InputException("warmup $warmup and minutes $minutes must not be below 0")
    }
}

/**
 * Measures a bundle as gemma-bench does, and writes the same JSON (docs/benchmarking.md): one model loaded, a prompt of random
 * tokens, tokens generated greedily after it, repeated. Every repetition and every token's latency is kept; nothing is averaged.
 */
public class Benchmark(private val system: BenchmarkSystem = BenchmarkSystem()) {
    /**
     * Measure. Takes minutes, so not on a main thread; interrupting the thread ends it.
     *
     * @param folder of the bundle.
     * @param progress told after each repetition how many are done, warm-ups counted too; may throw to end it.
     * @return the document, ready to be written. What cannot be measured is a result too, with `failure`.
     */
    public fun run(folder: File, settings: BenchmarkSettings, progress: (done: Int) -> Unit = {}): String {
        val before = system.state()
        val result = linkedMapOf<String, Any?>(
            "tool" to TOOL,
            "started" to Instant.now().truncatedTo(ChronoUnit.SECONDS).toString().replace("Z", "+00:00"),
            "model" to mapOf("name" to folder.name, "backend" to "onnx"),
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
        return OnnxRuntime.open(bundle, threads).use { runtime ->
            val loadS = secondsSince(start)
            val loadedMib = system.residentMib()
            val times = Times(start)
            val random = Random(0)
            val memory = ArrayList<List<Double?>>()
            var number = -settings.warmup
            while (number < settings.repeat || secondsSince(start) < 60 * settings.minutes) {
                if (Thread.interrupted()) throw InterruptedException("the benchmark was ended")
                val ids = IntArray(settings.prefill) { random.nextInt(bundle.vocabSize) }
                repeat(runtime, ids, settings.decode, if (number < 0) null else times)
                memory += listOf(secondsSince(start), system.residentMib())
                number++
                progress(number + settings.warmup)
            }
            times.lists + mapOf(
                "model" to describe(bundle, settings),
                "settings" to described(settings, threads),
                "versions" to mapOf("gemma-edge" to VERSION, "onnxruntime" to OrtEnvironment.getEnvironment().version),
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

    /** Prompt and generation, from an empty cache; [times] is null for a warm-up. */
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

    private fun describe(bundle: Bundle, settings: BenchmarkSettings): Map<String, Any> {
        val depth = settings.prefill + settings.decode / 2
        return mapOf(
            "name" to bundle.folder.name,
            "backend" to "onnx",
            "bytes" to bundle.backendBytes,
            "manifest_sha256" to sha256(File(bundle.folder, Bundle.MANIFEST)),
            "context" to bundle.cache.context,
            "read_bytes_per_token" to bundle.weightBytes + bundle.cache.bytesSeen(depth),
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

    /** The samples of all repetitions, in seconds and milliseconds. */
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
        /** Of this library. */
        public const val VERSION: String = "0.1.0"
        private const val TOOL = "gemma-edge-android"
        private const val SCHEMA_VERSION = 1

        private fun secondsSince(start: Long) = (System.nanoTime() - start) / 1e9

        private fun sha256(file: File): String =
            MessageDigest.getInstance("SHA-256").digest(file.readBytes()).joinToString("") { "%02x".format(it) }

        /** `Benchmark BUNDLE RESULT.json THREADS PREFILL DECODE REPEAT WARMUP MINUTES`: for a JVM without the app. */
        @JvmStatic
        public fun main(args: Array<String>) {
            val (threads, prefill, decode, repeat, warmup) = args.slice(2..6).map { it.toInt() }
            val settings = BenchmarkSettings(threads, prefill, decode, repeat, warmup, args[7].toDouble())
            writeWhole(File(args[1]), Benchmark().run(File(args[0]), settings))
        }

        /** Write a file so that whoever waits for it never reads a half. */
        public fun writeWhole(file: File, text: String) {
            val half = File(file.parentFile, ".${file.name}.partial")
            half.writeText(text)
            check(half.renameTo(file)) { "cannot write $file" }
        }
    }
}
