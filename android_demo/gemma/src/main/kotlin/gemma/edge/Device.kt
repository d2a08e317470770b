package gemma.edge

import java.io.File
import java.io.IOException

/**
 * The free memory and the processor cores of the device, read from /proc and /sys. Android apps may read these files too.
 *
 * @property availableBytes memory that the system can give without killing other apps; [UNKNOWN] if it does not tell.
 * @property bigCores number of cores that are not of the slowest kind; all cores if there is only one kind.
 */
public data class Device(public val availableBytes: Long, public val bigCores: Int) {
    /**
     * Check that a backend of a bundle fits into the free memory. If it did not fit, the system would kill the app.
     *
     * @throws NotEnoughMemoryException the bundle needs more memory than is free; the message has both numbers.
     */
    public fun requireMemoryFor(bundle: Bundle, backend: Backend) {
        val needed = backend.plan.residentBytes
        if (availableBytes == UNKNOWN || needed <= availableBytes) return
        throw NotEnoughMemoryException(
            needed,
            availableBytes,
            "${bundle.folder.name} needs ${mib(needed)} MiB of memory while it generates and the device has ${mib(availableBytes)} MiB free; " +
                "close other apps, or export with a smaller --context or fewer --bits",
        )
    }

    /** Check that the factors of an adapter fit into the free memory. */
    internal fun requireMemoryFor(adapter: Adapter) {
        if (availableBytes == UNKNOWN || adapter.bytes <= availableBytes) return
        throw NotEnoughMemoryException(
            adapter.bytes,
            availableBytes,
            "the adapter ${adapter.folder.name} needs ${mib(adapter.bytes)} MiB of memory and the device has ${mib(availableBytes)} MiB free; " +
                "close other apps, or train an adapter of a smaller rank",
        )
    }

    /** The number of threads for a bundle: one per big core, but no more than the bundle's target has. */
    public fun threadsFor(bundle: Bundle): Int = minOf(bundle.threads, bigCores)

    public companion object {
        /** The value of [availableBytes] if the system does not tell. Then no bundle is refused. */
        public const val UNKNOWN: Long = -1

        /** This device, with the memory that is free now. */
        public fun current(): Device = read(File("/"), Runtime.getRuntime().availableProcessors())

        /** The device whose /proc and /sys are in [root]. */
        internal fun read(root: File, processors: Int): Device {
            val available = lines(File(root, "proc/meminfo")).firstOrNull { it.startsWith("MemAvailable:") }
                ?.split(Regex("\\s+"))?.getOrNull(1)?.toLongOrNull()?.times(1024)
            val cores = File(root, "sys/devices/system/cpu").listFiles { file -> CORE.matches(file.name) }.orEmpty()
            val speeds = cores.mapNotNull { lines(File(it, "cpufreq/cpuinfo_max_freq")).firstOrNull()?.trim()?.toLongOrNull() }
            val big = speeds.count { it > speeds.min() }
            return Device(available ?: UNKNOWN, if (big > 0) minOf(big, processors) else processors)
        }

        private val CORE = Regex("cpu\\d+")

        private fun lines(file: File): List<String> = try {
            if (file.canRead()) file.readLines() else emptyList()
        } catch (_: IOException) {
            emptyList() // the core is switched off
        }

        private fun mib(bytes: Long) = bytes shr 20
    }
}
