package gemma.edge.app.bundles

import android.app.PendingIntent
import android.app.Service
import android.content.Context
import android.content.Intent
import android.content.pm.ServiceInfo
import android.os.IBinder
import android.os.PowerManager
import androidx.core.app.NotificationChannelCompat
import androidx.core.app.NotificationCompat
import androidx.core.app.NotificationManagerCompat
import androidx.core.app.ServiceCompat
import gemma.edge.app.GemmaApplication
import gemma.edge.app.ModelsActivity
import gemma.edge.app.R
import kotlinx.coroutines.Job
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch

/** Keeps the app alive during an import, also when no screen of it is in front, and shows in a notification how far the import is. */
class ImportService : Service() {
    private val scope = MainScope()
    private var work: Job? = null

    override fun onBind(intent: Intent?): IBinder? = null

    override fun onStartCommand(intent: Intent?, flags: Int, startId: Int): Int {
        val imports = (application as GemmaApplication).imports
        show(imports.state.value) // Android ends the process of a service that shows nothing within seconds
        val request = intent?.let(::requestIn)
        if (request == null) {
            work?.cancel() ?: stopSelf()
        } else if (work == null) {
            work = scope.launch { run(imports, request) }
        }
        return START_NOT_STICKY // Android lets no app come to the front by itself; the screen offers to go on
    }

    private suspend fun run(imports: Imports, request: ImportRequest) {
        val awake = getSystemService(PowerManager::class.java).newWakeLock(PowerManager.PARTIAL_WAKE_LOCK, "gemma-edge:import")
        val shown = scope.launch { imports.state.collect(::show) }
        try {
            awake.acquire(LONGEST_MS)
            imports.run { request.open(this) }
        } finally {
            if (awake.isHeld) awake.release()
            shown.cancel()
            ServiceCompat.stopForeground(this, ServiceCompat.STOP_FOREGROUND_REMOVE)
            stopSelf()
        }
    }

    /** Android lets such a service run for six hours a day. */
    override fun onTimeout(startId: Int, fgsType: Int) {
        work?.cancel()
    }

    override fun onDestroy() {
        scope.cancel()
        super.onDestroy()
    }

    private fun show(state: ImportState) {
        val importing = state as? ImportState.Importing ?: ImportState.Importing("")
        val step = importing.step
        val screen = PendingIntent.getActivity(this, 0, Intent(this, ModelsActivity::class.java), PendingIntent.FLAG_IMMUTABLE)
        val stop = PendingIntent.getService(this, 0, stopIntent(this), PendingIntent.FLAG_IMMUTABLE)
        NotificationManagerCompat.from(this).createNotificationChannel(
            NotificationChannelCompat.Builder(CHANNEL, NotificationManagerCompat.IMPORTANCE_LOW).setName(getString(R.string.models)).build(),
        )
        val notification = NotificationCompat.Builder(this, CHANNEL)
            .setSmallIcon(R.drawable.download)
            .setContentTitle(importing.describe(this))
            .setProgress(100, step?.percent ?: 0, step == null)
            .setOngoing(true)
            .setOnlyAlertOnce(true)
            .setContentIntent(screen)
            .addAction(0, getString(R.string.stop_import), stop)
            .build()
        ServiceCompat.startForeground(this, NOTIFICATION, notification, ServiceInfo.FOREGROUND_SERVICE_TYPE_DATA_SYNC)
    }

    companion object {
        private const val CHANNEL = "imports"
        private const val NOTIFICATION = 1
        private const val LONGEST_MS = 6 * 3600 * 1000L
        private const val KIND = "kind"
        private const val ADDRESS = "address"

        /** The intent that stops the import that is running. */
        fun stopIntent(context: Context): Intent = Intent(context, ImportService::class.java)

        /** The intent that starts an import. */
        fun intent(context: Context, request: ImportRequest): Intent =
            stopIntent(context).putExtra(KIND, request.kind.name).putExtra(ADDRESS, request.address)

        private fun requestIn(intent: Intent): ImportRequest? {
            val kind = ImportRequest.Kind.entries.firstOrNull { it.name == intent.getStringExtra(KIND) } ?: return null
            return ImportRequest(kind, intent.getStringExtra(ADDRESS) ?: return null)
        }
    }
}
