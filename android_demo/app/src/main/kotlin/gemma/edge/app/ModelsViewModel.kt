package gemma.edge.app

import android.app.Application
import androidx.core.content.ContextCompat
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
import gemma.edge.app.bundles.BundleStore
import gemma.edge.app.bundles.ImportRequest
import gemma.edge.app.bundles.ImportService
import gemma.edge.app.bundles.ImportState
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/** A model on the device. */
data class ModelRow(val folder: File, val bytes: Long, val selected: Boolean)

/**
 * What the models screen shows.
 *
 * @property leftovers names of models whose import did not come to its end.
 * @property last the import that was begun last; it can be begun again.
 */
data class ModelsUiState(
    val rows: List<ModelRow> = emptyList(),
    val import: ImportState = ImportState.Idle,
    val leftovers: List<String> = emptyList(),
    val last: ImportRequest? = null,
)

/** Lists, imports, chooses and deletes models. [ImportService] runs the imports. */
class ModelsViewModel(application: Application) : AndroidViewModel(application) {
    private val store = BundleStore(application)
    private val imports = (application as GemmaApplication).imports
    private val mutable = MutableStateFlow(ModelsUiState())
    private val changing = Mutex()

    val state: StateFlow<ModelsUiState> = mutable.asStateFlow()

    init {
        viewModelScope.launch {
            imports.state.collect { import ->
                if (import !is ImportState.Importing) change {}
                mutable.update { it.copy(import = import) }
            }
        }
    }

    /** Import a model and choose it, unless another import is running. */
    fun import(request: ImportRequest) {
        if (mutable.value.import is ImportState.Importing) return
        store.rememberImport(request)
        ContextCompat.startForegroundService(getApplication(), ImportService.intent(getApplication(), request))
    }

    /** Delete what imports left that did not come to their end. */
    fun removeLeftovers() {
        viewModelScope.launch { change { imports.removeLeftovers() } }
    }

    fun use(folder: File) {
        viewModelScope.launch { change { store.select(folder) } }
    }

    fun delete(folder: File) {
        viewModelScope.launch { change { store.delete(folder) } }
    }

    /** Wait for earlier changes, make this one, and read the list again. */
    private suspend fun change(act: suspend () -> Unit) = changing.withLock {
        withContext(Dispatchers.IO) {
            act()
            val leftovers = store.leftovers().map(store::nameOf)
            mutable.update { it.copy(rows = rows(), leftovers = leftovers, last = store.lastImport()) }
        }
    }

    private fun rows(): List<ModelRow> = store.list().map { folder ->
        ModelRow(folder, folder.walk().filter { it.isFile }.sumOf { it.length() }, folder == store.selected())
    }
}
