package gemma.edge.app

import android.app.Application
import android.content.Context
import gemma.edge.Bundle
import gemma.edge.ChatTemplate
import gemma.edge.Device
import gemma.edge.GemmaRuntime
import gemma.edge.GemmaSession
import gemma.edge.Tokenizer
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/** The application. It owns the [engine], which therefore outlives every screen. */
open class GemmaApplication : Application() {
    open val engine: Engine = Engine()
}

/** The engine of the running application. */
val Context.engine: Engine get() = (applicationContext as GemmaApplication).engine

/**
 * Holds at most one open model, because a phone has no memory for two. A screen that is rotated finds its model still open.
 *
 * @param device measures the free memory and the cores; called whenever a model is opened.
 */
class Engine(private val device: () -> Device = Device::current) {
    private val lock = Mutex()
    private var session: GemmaSession? = null

    /**
     * The session of a bundle. The session that is open is returned if it is of the same bundle; otherwise it is closed first.
     *
     * @throws gemma.edge.GemmaException the bundle cannot be used on this device.
     */
    suspend fun open(folder: File): GemmaSession = lock.withLock {
        session?.takeIf { it.bundle.folder == folder } ?: withContext(Dispatchers.IO) {
            session?.close()
            session = null
            val bundle = Bundle.open(folder)
            val template = ChatTemplate.of(bundle)
            val tokenizer = Tokenizer.open(bundle)
            GemmaSession(GemmaRuntime.open(bundle, device = device()), tokenizer, template).also { session = it }
        }
    }

    /** Close the open model, if there is one, and free its memory. */
    suspend fun close() = lock.withLock {
        withContext(Dispatchers.IO) { session?.close() }
        session = null
    }
}
