package gemma.edge.app

import gemma.edge.Bundle
import gemma.edge.ChatTemplate
import gemma.edge.Device
import gemma.edge.GemmaSession
import gemma.edge.OnnxRuntime
import gemma.edge.Tokenizer
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/** The one model that this process holds: a phone has no memory for two. Outlives screens, so that rotation loads nothing. */
object Engine {
    /** What the device has free; tests put another one here. */
    @Volatile
    var device: () -> Device = Device::current

    private val lock = Mutex()
    private var session: GemmaSession? = null

    /** The session of a bundle: the open one if it is the same bundle, else that one is closed first. */
    suspend fun open(folder: File): GemmaSession = lock.withLock {
        session?.takeIf { it.bundle.folder == folder } ?: withContext(Dispatchers.IO) {
            session?.close()
            session = null
            val bundle = Bundle.open(folder)
            val template = ChatTemplate.of(bundle)
            val tokenizer = Tokenizer.open(bundle)
            GemmaSession(OnnxRuntime.open(bundle, device = device()), tokenizer, template).also { session = it }
        }
    }

    /** Free the model's memory. */
    suspend fun close() = lock.withLock {
        withContext(Dispatchers.IO) { session?.close() }
        session = null
    }
}
