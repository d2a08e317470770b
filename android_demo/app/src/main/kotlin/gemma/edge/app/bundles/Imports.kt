package gemma.edge.app.bundles

import android.content.Context
import android.net.Uri
import gemma.edge.app.R
import gemma.edge.app.failureOf
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.withContext

/** What is imported, and from where. It fits into an intent and into the app's settings. */
data class ImportRequest(val kind: Kind, val address: String) {
    enum class Kind { FOLDER, ZIP, DOWNLOAD }

    /**
     * Open the source.
     *
     * @throws gemma.edge.GemmaException the address is none.
     * @throws java.io.IOException there is nothing, or the app may not read it any more.
     */
    fun open(context: Context): Source = when (kind) {
        Kind.FOLDER -> TreeSource(context, Uri.parse(address))
        Kind.ZIP -> zipSource(context, Uri.parse(address))
        Kind.DOWNLOAD -> HttpSource.of(address)
    }
}

/** What an import is doing. */
sealed interface ImportState {
    /** No import is running, and the last one went well or was stopped. */
    data object Idle : ImportState

    /** A model is being imported; [step] is null until the first bytes are copied. */
    data class Importing(val name: String, val step: ImportStep? = null) : ImportState {
        /** How far it is, for the user. */
        fun describe(context: Context): String = when (step) {
            null -> context.getString(R.string.importing)
            is ImportStep.Copying -> context.getString(R.string.copying, name, step.percent)
            is ImportStep.Checking -> context.getString(R.string.checking, name, step.percent)
        }
    }

    /** The last import did not go well. */
    data class Failed(val reason: String) : ImportState
}

/** Imports models, one at a time. The application owns it, so it outlives every screen; [ImportService] keeps the process alive. */
class Imports(private val store: BundleStore) {
    private val mutable = MutableStateFlow<ImportState>(ImportState.Idle)
    private val running = Mutex()

    val state: StateFlow<ImportState> = mutable.asStateFlow()

    /** Import a model and choose it, unless an import is running. After a cancellation the next import goes on where this one was. */
    suspend fun run(open: () -> Source) {
        if (!running.tryLock()) return
        try {
            mutable.value = ImportState.Importing("")
            val failure = withContext(Dispatchers.IO) {
                failureOf {
                    val source = open()
                    val folder = store.import(source) { step ->
                        ensureActive()
                        mutable.value = ImportState.Importing(source.name, step)
                    }
                    store.select(folder)
                }
            }
            mutable.value = if (failure == null) ImportState.Idle else ImportState.Failed(failure)
        } finally {
            if (mutable.value is ImportState.Importing) mutable.value = ImportState.Idle // it was stopped
            running.unlock()
        }
    }

    /** Delete what imports left that did not come to their end, unless an import is running, which may go on with it. */
    suspend fun removeLeftovers() {
        if (!running.tryLock()) return
        try {
            withContext(Dispatchers.IO) { store.removeLeftovers() }
        } finally {
            running.unlock()
        }
    }
}
