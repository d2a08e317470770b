package gemma.edge

import java.io.File
import java.io.IOException

/**
 * The facts about the system that a benchmark notes, read from /proc and /sys. The app adds what only Android knows: battery,
 * thermal status and PSS. Keys and units are those of docs/measure/benchmarking.md.
 */
public open class BenchmarkSystem {
    /** Facts about the machine that matter for its speed; nothing identifies the machine or its owner. `name` is always there. */
    public open fun device(): Map<String, Any> = buildMap {
        put("name", processor() ?: System.getProperty("os.arch"))
        put("system", "${System.getProperty("os.name")} ${System.getProperty("os.arch")}, Java ${System.getProperty("java.version")}")
        put("abi", System.getProperty("os.arch").let { ABIS[it] ?: it })
        put("flags", flagsIn(text("/proc/cpuinfo").orEmpty()))
        put("cores", Runtime.getRuntime().availableProcessors())
        field("/proc/meminfo", "MemTotal")?.let { put("ram_bytes", it.kib() * 1024) }
        text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")?.let { put("governor", it) }
    }

    /** Facts that change during a benchmark. */
    public open fun state(): Map<String, Any> = buildMap {
        val cores = File("/sys/devices/system/cpu").listFiles().orEmpty().map { it.path }
        cores.mapNotNull { text("$it/cpufreq/scaling_cur_freq")?.toLongOrNull() }.maxOrNull()?.let { put("cpu_mhz", it / 1e3) }
        text("/proc/loadavg")?.substringBefore(' ')?.toDoubleOrNull()?.let { put("load_average", it) }
    }

    /** Resident memory of this process in MiB, including the mapped pages of files; null if the system does not tell. */
    public fun residentMib(): Double? = field("/proc/self/status", "VmRSS")?.let { it.kib() / 1024.0 }

    /** The highest resident memory so far, in MiB; null if the system does not tell. */
    public fun peakMib(): Double? = field("/proc/self/status", "VmHWM")?.let { it.kib() / 1024.0 }

    /** Proportional set size in MiB; null if the system does not tell. */
    public open fun pssMib(): Double? = null

    /** The version of the library that runs a backend, for libraries that do not tell it themselves; null if it is not known. */
    public open fun libraryVersion(backend: String): String? = null

    private fun processor(): String? = field("/proc/cpuinfo", "model name") ?: field("/proc/cpuinfo", "Hardware")

    private fun field(path: String, name: String): String? =
        text(path)?.lineSequence()?.firstOrNull { it.startsWith(name) }?.substringAfter(':')?.trim()

    private fun String.kib(): Long = substringBefore(' ').toLong()

    private fun text(path: String): String? = try {
        File(path).takeIf { it.canRead() }?.readText()?.trim()
    } catch (_: IOException) {
        null // the core is switched off
    }

    internal companion object {
        /** The instruction sets for which kernels differ: `FLAGS` in bench/machine.py. */
        val FLAGS = listOf("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")

        /** Android's names of what Java calls otherwise. */
        private val ABIS = mapOf("amd64" to "x86_64", "aarch64" to "arm64-v8a")

        /** Those of [FLAGS] that the first processor of a /proc/cpuinfo has; the line is `flags` on x86 and `Features` on Arm. */
        fun flagsIn(cpuinfo: String): List<String> {
            val line = cpuinfo.lineSequence().firstOrNull { it.startsWith("flags") || it.startsWith("Features") }.orEmpty()
            val words = line.substringAfter(':').split(' ').toSet()
            return FLAGS.filter { it in words }
        }
    }
}
