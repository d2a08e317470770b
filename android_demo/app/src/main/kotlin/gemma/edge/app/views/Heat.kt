package gemma.edge.app.views

import android.content.Context
import android.os.Build
import android.os.PowerManager
import androidx.annotation.RequiresApi
import gemma.edge.app.R

/** Watches the phone's thermal status while a screen is in front, and tells which warning to show; null for none. */
class Heat(private val context: Context, private val show: (Int?) -> Unit) {
    private var listener: Any? = null

    fun start() {
        if (Build.VERSION.SDK_INT >= 29) watch()
    }

    fun stop() {
        if (Build.VERSION.SDK_INT >= 29) unwatch()
    }

    @RequiresApi(29)
    private fun watch() {
        val power = context.getSystemService(PowerManager::class.java) ?: return
        val added = PowerManager.OnThermalStatusChangedListener { status -> show(warningFor(status)) }
        listener = added
        power.addThermalStatusListener(added) // calls it on the main thread
        show(warningFor(power.currentThermalStatus))
    }

    @RequiresApi(29)
    private fun unwatch() {
        val added = listener as? PowerManager.OnThermalStatusChangedListener ?: return
        context.getSystemService(PowerManager::class.java)?.removeThermalStatusListener(added)
        listener = null
    }

    companion object {
        private const val MODERATE = 2 // PowerManager.THERMAL_STATUS_MODERATE: the phone slows down
        private const val CRITICAL = 4 // PowerManager.THERMAL_STATUS_CRITICAL: it has slowed down as far as it can

        /** The warning for a thermal status of Android, 0 to 6. */
        fun warningFor(status: Int): Int? = when {
            status >= CRITICAL -> R.string.too_hot
            status >= MODERATE -> R.string.warm
            else -> null
        }
    }
}
