package gemma.edge.app

import android.app.Application
import android.net.Uri
import android.os.Bundle
import android.text.format.Formatter
import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.TextView
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.lifecycle.viewModelScope
import androidx.recyclerview.widget.LinearLayoutManager
import androidx.recyclerview.widget.RecyclerView
import com.google.android.material.appbar.MaterialToolbar
import com.google.android.material.button.MaterialButton
import com.google.android.material.progressindicator.LinearProgressIndicator
import gemma.edge.GemmaException
import java.io.File
import java.io.IOException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
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

/** What the models screen shows. */
data class ModelsState(
    val rows: List<ModelRow> = emptyList(),
    val importing: String? = null,
    val step: ImportStep? = null,
    val failure: String? = null,
)

/** Lists, imports, chooses and deletes models. An import goes on while the screen rotates. */
class ModelsViewModel(application: Application) : AndroidViewModel(application) {
    private val store = BundleStore(application)
    private val mutable = MutableStateFlow(ModelsState())
    private val changing = Mutex()

    val state: StateFlow<ModelsState> = mutable.asStateFlow()

    init {
        change {}
    }

    fun import(source: Source) {
        if (mutable.value.importing != null) return
        mutable.update { it.copy(importing = source.name, failure = null) }
        val running = change {
            val folder = store.import(source) { step -> if (step != mutable.value.step) mutable.update { it.copy(step = step) } }
            store.select(folder)
        }
        running.invokeOnCompletion { mutable.update { it.copy(importing = null, step = null) } }
    }

    fun use(folder: File) {
        change { store.select(folder) }
    }

    fun delete(folder: File) {
        change { store.delete(folder) }
    }

    /** One change after the other; then the list is read again. */
    private fun change(act: () -> Unit): Job = viewModelScope.launch {
        changing.withLock {
            val failure = withContext(Dispatchers.IO) { reasonIfFails(act) }
            val rows = withContext(Dispatchers.IO) { rows() }
            mutable.update { it.copy(rows = rows, failure = failure) }
        }
    }

    private fun reasonIfFails(act: () -> Unit): String? = try {
        act()
        null
    } catch (error: GemmaException) {
        error.message
    } catch (error: IOException) {
        error.message
    }

    private fun rows(): List<ModelRow> = store.list().map { folder ->
        ModelRow(folder, folder.walk().filter { it.isFile }.sumOf { it.length() }, folder == store.selected())
    }
}

/** The models screen. */
class ModelsActivity : AppCompatActivity() {
    val models: ModelsViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private val adapter = Adapter()
    private val picker = registerForActivityResult(ActivityResultContracts.OpenDocumentTree()) { tree: Uri? ->
        if (tree != null) models.import(TreeSource(this, tree))
    }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.models)
        findViewById<MaterialToolbar>(R.id.toolbar).setNavigationOnClickListener { finish() }
        findViewById<RecyclerView>(R.id.list).let {
            it.layoutManager = LinearLayoutManager(this)
            it.adapter = adapter
        }
        findViewById<MaterialButton>(R.id.import_model).setOnClickListener { picker.launch(null) }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { models.state.collect(::show) } }
    }

    private fun show(state: ModelsState) {
        adapter.rows = state.rows
        adapter.notifyDataSetChanged()
        findViewById<MaterialButton>(R.id.import_model).isEnabled = state.importing == null
        val progress = findViewById<LinearProgressIndicator>(R.id.progress)
        progress.visibility = if (state.importing == null) View.GONE else View.VISIBLE
        progress.progress = state.step?.percent ?: 0
        findViewById<TextView>(R.id.status).text = when (val step = state.step) {
            is ImportStep.Copying -> getString(R.string.copying, state.importing, step.percent)
            is ImportStep.Checking -> getString(R.string.checking, state.importing, step.percent)
            null -> state.failure.orEmpty()
        }
    }

    private inner class Adapter : RecyclerView.Adapter<RecyclerView.ViewHolder>() {
        var rows: List<ModelRow> = emptyList()

        override fun getItemCount() = rows.size

        override fun onCreateViewHolder(parent: ViewGroup, viewType: Int): RecyclerView.ViewHolder =
            object : RecyclerView.ViewHolder(LayoutInflater.from(parent.context).inflate(R.layout.model, parent, false)) {}

        override fun onBindViewHolder(holder: RecyclerView.ViewHolder, position: Int) {
            val row = rows[position]
            val name = row.folder.name
            val size = Formatter.formatShortFileSize(this@ModelsActivity, row.bytes)
            holder.itemView.findViewById<TextView>(R.id.name).text = getString(R.string.model_row, name, size)
            holder.itemView.findViewById<MaterialButton>(R.id.use).apply {
                text = getString(if (row.selected) R.string.used else R.string.use)
                isEnabled = !row.selected
                setOnClickListener { models.use(row.folder) }
            }
            holder.itemView.findViewById<MaterialButton>(R.id.delete).apply {
                contentDescription = getString(R.string.delete, name)
                setOnClickListener { models.delete(row.folder) }
            }
        }
    }
}
