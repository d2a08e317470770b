package gemma.edge

import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class DeviceTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val bundle get() = Bundle.open(Fixtures.demoBundle)
    private val backend get() = bundle.backend("onnx")

    private fun write(path: String, text: String) = File(temporary.root, path).run { parentFile!!.mkdirs(); writeText(text) }

    private fun cores(vararg maxKhz: Int) = maxKhz.forEachIndexed { core, khz ->
        write("sys/devices/system/cpu/cpu$core/cpufreq/cpuinfo_max_freq", "$khz\n")
    }

    @Test
    fun little_cores_are_not_counted() {
        cores(2016000, 2016000, 2803200, 2803200, 2803200, 2803200, 2803200, 3187200)
        write("sys/devices/system/cpu/cpufreq/boost", "0")
        assertEquals(6, Device.read(temporary.root, processors = 8).bigCores)
    }

    @Test
    fun cores_of_one_kind_all_count() {
        cores(2400000, 2400000, 2400000, 2400000)
        assertEquals(4, Device.read(temporary.root, processors = 4).bigCores)
        assertEquals(3, Device.read(File("/nowhere"), processors = 3).bigCores)
    }

    @Test
    fun free_memory_is_what_the_kernel_calls_available() {
        write("proc/meminfo", "MemTotal:        7654321 kB\nMemFree:          123456 kB\nMemAvailable:    2345678 kB\n")
        assertEquals(2345678L * 1024, Device.read(temporary.root, 1).availableBytes)
        assertEquals(Device.UNKNOWN, Device.read(File("/nowhere"), 1).availableBytes)
        assertTrue(Device.current().availableBytes > 0)
    }

    @Test
    fun a_bundle_that_does_not_fit_is_refused_with_both_numbers() {
        val small = Device(availableBytes = backend.plan.residentBytes - 1, bigCores = 1)
        assertRefuses<NotEnoughMemoryException>("${backend.plan.residentBytes shr 20} MiB", "close other apps") { small.requireMemoryFor(bundle, backend) }
        small.copy(availableBytes = backend.plan.residentBytes).requireMemoryFor(bundle, backend)
        small.copy(availableBytes = Device.UNKNOWN).requireMemoryFor(bundle, backend)
    }

    @Test
    fun threads_are_the_big_cores_at_most_the_targets() {
        assertEquals(2, Device(Device.UNKNOWN, bigCores = 2).threadsFor(bundle))
        assertEquals(bundle.threads, Device(Device.UNKNOWN, bigCores = 16).threadsFor(bundle))
    }
}
