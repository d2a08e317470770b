package gemma.edge

import java.io.File
import java.io.IOException

/**
 * What matters of the device: free memory and processor cores. Read from /proc and /sys, which Android apps may read too.
 *
 * @property availableBytes what the system can give without killing other apps; [UNKNOWN] where it does not tell.
 * @property bigCores cores that are not of the slowest kind; all of them where there is one kind.
 */
public data class Device(public val availableBytes: Long, public val bigCores: Int) {
    /**
     * Refuse a bundle that will not fit, before the system kills the app for it.
     *
     * @throws NotEnoughMemoryException with both numbers.
     */
    public fun requireMemoryFor(bundle: Bundle) {
        val needed = bundle.residentBytes
        if (availableBytes == UNKNOWN || needed <= availableBytes) return
        throw NotEnoughMemoryException(
            needed,
            availableBytes,
            "${bundle.folder.name} needs ${mib(needed)} MiB of memory while it generates and the device has ${mib(availableBytes)} MiB free; " +
                "close other apps, or export with a smaller --context or fewer --bits",
        )
    }

    /** Threads for a bundle: one for each big core, no more than its target has. */
    public fun threadsFor(bundle: Bundle): Int = minOf(bundle.threads, bigCores)

    public companion object {
        /** The system does not tell how much memory is free: nothing is refused. */
        public const val UNKNOWN: Long = -1

        /** This device, now. */
        public fun current(): Device = read(File("/"), Runtime.getRuntime().availableProcessors())

        /** A device whose /proc and /sys lie below [root]. */
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
            emptyList() // a core that is switched off
        }

        private fun mib(bytes: Long) = bytes shr 20
    }
}
