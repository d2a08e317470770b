package gemma.edge.app

import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager
import android.os.Build
import android.os.Debug
import android.os.PowerManager
import gemma.edge.BenchmarkSystem
import java.io.FileNotFoundException
import org.json.JSONObject

/** Adds what only Android knows to the notes of a benchmark: the name of the phone, battery, thermal status and PSS. */
class AndroidSystem(private val context: Context) : BenchmarkSystem() {
    override fun device(): Map<String, Any> = super.device() + buildMap {
        put("name", "${Build.MANUFACTURER} ${Build.MODEL}")
        put("system", "Android ${Build.VERSION.RELEASE} (API ${Build.VERSION.SDK_INT})")
        put("abi", Build.SUPPORTED_ABIS.firstOrNull() ?: "unknown")
        if (Build.VERSION.SDK_INT >= 31) put("soc", "${Build.SOC_MANUFACTURER} ${Build.SOC_MODEL}")
    }

    override fun state(): Map<String, Any> = super.state() + battery() + thermal()

    override fun pssMib(): Double = Debug.getPss() / 1024.0

    /** The build writes this file beside the models; without it nothing is known. */
    override fun libraryVersion(backend: String): String? = try {
        JSONObject(context.assets.open("engines.json").use { it.readBytes().decodeToString() }).optString(backend).ifEmpty { null }
    } catch (_: FileNotFoundException) {
        null
    }

    private fun battery(): Map<String, Any> {
        val battery = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED)) ?: return emptyMap()
        val level = battery.getIntExtra(BatteryManager.EXTRA_LEVEL, -1)
        val scale = battery.getIntExtra(BatteryManager.EXTRA_SCALE, -1)
        val tenths = battery.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Int.MIN_VALUE)
        return buildMap {
            put("plugged", battery.getIntExtra(BatteryManager.EXTRA_PLUGGED, 0) != 0)
            if (level >= 0 && scale > 0) put("battery_percent", 100.0 * level / scale)
            if (tenths != Int.MIN_VALUE) put("battery_temperature_c", tenths / 10.0)
        }
    }

    private fun thermal(): Map<String, Any> = buildMap {
        val power = context.getSystemService(PowerManager::class.java) ?: return@buildMap
        if (Build.VERSION.SDK_INT >= 29) put("thermal_status", power.currentThermalStatus)
        if (Build.VERSION.SDK_INT >= 30) {
            val headroom = power.getThermalHeadroom(0)
            if (headroom.isFinite()) put("thermal_headroom", headroom.toDouble())
        }
    }
}
