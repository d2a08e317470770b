package gemma.edge

import java.util.WeakHashMap
import kotlinx.coroutines.sync.Mutex

/** What the sessions of a runtime share. */
internal class Shared {
    val turn = Mutex()
    var last: Any? = null // the session whose tokens are in the cache

    companion object {
        private val all = WeakHashMap<GemmaRuntime, Shared>()

        fun of(runtime: GemmaRuntime): Shared = synchronized(all) { all.getOrPut(runtime) { Shared() } }
    }
}
