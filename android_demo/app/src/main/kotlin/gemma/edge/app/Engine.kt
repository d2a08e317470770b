package gemma.edge.app

import android.app.Application
import android.content.Context
import gemma.edge.Bundle
import gemma.edge.ChatTemplate
import gemma.edge.Device
import gemma.edge.GemmaRuntime
import gemma.edge.GemmaSession
import gemma.edge.Tokenizer
import gemma.edge.app.bundles.BundleStore
import gemma.edge.app.bundles.Imports
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.launch
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/** The application. It owns the [engine] and the [imports], which therefore outlive every screen. */
open class GemmaApplication : Application() {
    open val engine: Engine by lazy { Engine(File(cacheDir, "engines")) }
    val imports: Imports by lazy { Imports(BundleStore(this)) }
    private val scope = MainScope()

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (isShort(level)) scope.launch { engine.closeIfIdle() }
    }

    companion object {
        private const val RUNNING_CRITICAL = 15 // ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL, sent until Android 14
        private const val UI_HIDDEN = 20

        /** Whether the system would end apps at this level: the app is on the list of those to end, or even the visible ones are. */
        fun isShort(level: Int): Boolean = level == RUNNING_CRITICAL || level > UI_HIDDEN
    }
}

/** The engine of the running application. */
val Context.engine: Engine get() = (applicationContext as GemmaApplication).engine

/** Who holds the session of an [Engine]. Its functions are called on the main thread. */
interface SessionHolder {
    /** Whether it works with the session. */
    val isBusy: Boolean

    /** End the work, keep what there is of it, and forget the session, which is closed after that. */
    suspend fun letGo()
}

/**
 * Holds at most one open model, because a phone has no memory for two. A screen that is rotated finds its model still open.
 *
 * @param cacheDir folder for files that make the next start faster; null keeps none.
 * @param device measures the free memory and the cores; called whenever a model is opened.
 */
class Engine(private val cacheDir: File? = null, private val device: () -> Device = Device::current) {
    private val lock = Mutex()
    private val holders = LinkedHashSet<SessionHolder>()
    private var session: GemmaSession? = null

    /** From now on [holder] is asked before the model is closed, until [remove]. To be called on the main thread, like [remove]. */
    fun add(holder: SessionHolder) {
        holders += holder
    }

    fun remove(holder: SessionHolder) {
        holders -= holder
    }

    /**
     * The session of a bundle. The session that is open is returned if it is of the same bundle and backend; otherwise it is closed first.
     *
     * @param backend the backend that runs; null takes the first one that has an engine in this app.
     * @throws gemma.edge.GemmaException the bundle cannot be used on this device.
     */
    suspend fun open(folder: File, backend: String? = null): GemmaSession = lock.withLock {
        session?.takeIf { it.bundle.folder == folder && (backend ?: it.backend.name) == it.backend.name } ?: withContext(Dispatchers.IO) {
            session?.close()
            session = null
            val bundle = Bundle.open(folder)
            val template = ChatTemplate.of(bundle)
            val tokenizer = Tokenizer.open(bundle)
            cacheDir?.mkdirs()
            val runtime = GemmaRuntime.open(bundle, backend, cacheDir = cacheDir, device = device())
            GemmaSession(runtime, tokenizer, template).also { session = it }
        }
    }

    /** Close the open model, if there is one, and free its memory. Whoever holds it ends its work first. */
    suspend fun close() = withoutModel {}

    /** Close the open model unless somebody works with it. */
    suspend fun closeIfIdle() {
        if (holders.none { it.isBusy }) close()
    }

    /** Close the open model and do what needs its memory. Whoever opens a model in the meantime waits. */
    suspend fun <T> withoutModel(act: suspend () -> T): T {
        holders.toList().forEach { it.letGo() }
        return lock.withLock {
            withContext(Dispatchers.IO) { session?.close() }
            session = null
            act()
        }
    }

    companion object {
        /**
         * The backends of a bundle that have an engine in this app, in the order in which they are tried.
         *
         * @throws gemma.edge.GemmaException the folder is not a bundle.
         */
        fun backendsOf(folder: File): List<String> = Bundle.open(folder).backendNames.let { held -> GemmaRuntime.available().filter { it in held } }
    }
}
