package gemma.edge.app

import android.app.Application
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
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

/** What the models screen says below the list. */
sealed interface ImportState {
    /** No import is running, and the last change went well. */
    data object Idle : ImportState

    /** A model is being imported; [step] is null until the first bytes are copied. */
    data class Importing(val name: String, val step: ImportStep? = null) : ImportState

    /** The last change did not go well. */
    data class Failed(val reason: String) : ImportState
}

/** What the models screen shows. */
data class ModelsUiState(val rows: List<ModelRow> = emptyList(), val import: ImportState = ImportState.Idle)

/** Lists, imports, chooses and deletes models. An import continues while the screen rotates. */
class ModelsViewModel(application: Application) : AndroidViewModel(application) {
    private val store = BundleStore(application)
    private val mutable = MutableStateFlow(ModelsUiState())
    private val changing = Mutex()

    val state: StateFlow<ModelsUiState> = mutable.asStateFlow()

    init {
        startChange {}
    }

    /** Import a model and choose it, unless another import is running. */
    fun import(source: Source) {
        if (mutable.value.import is ImportState.Importing) return
        mutable.update { it.copy(import = ImportState.Importing(source.name)) }
        viewModelScope.launch {
            val result = change {
                val folder = store.import(source) { step ->
                    mutable.update { it.copy(import = ImportState.Importing(source.name, step)) }
                }
                store.select(folder)
            }
            mutable.update { it.copy(import = result) }
        }
    }

    fun use(folder: File) = startChange { store.select(folder) }

    fun delete(folder: File) = startChange { store.delete(folder) }

    private fun startChange(act: () -> Unit) {
        viewModelScope.launch {
            val result = change(act)
            // an import may be waiting for this change
            mutable.update { if (it.import is ImportState.Importing) it else it.copy(import = result) }
        }
    }

    /** Wait for earlier changes, make this one, and read the list again. */
    private suspend fun change(act: () -> Unit): ImportState = changing.withLock {
        val failure = withContext(Dispatchers.IO) { failureOf(act) }
        val rows = withContext(Dispatchers.IO) { rows() }
        mutable.update { it.copy(rows = rows) }
        if (failure == null) ImportState.Idle else ImportState.Failed(failure)
    }

    private fun rows(): List<ModelRow> = store.list().map { folder ->
        ModelRow(folder, folder.walk().filter { it.isFile }.sumOf { it.length() }, folder == store.selected())
    }
}
