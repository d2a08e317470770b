package gemma.edge.app

import android.net.Uri
import android.os.Bundle
import android.text.format.Formatter
import android.view.ViewGroup
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.core.view.isVisible
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.recyclerview.widget.LinearLayoutManager
import androidx.recyclerview.widget.RecyclerView
import gemma.edge.app.databinding.ModelBinding
import gemma.edge.app.databinding.ModelsBinding
import kotlinx.coroutines.launch

/** The models screen: it shows the [ModelsUiState] and passes the user's actions on to the [ModelsViewModel]. */
class ModelsActivity : AppCompatActivity() {
    val models: ModelsViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private val adapter = Adapter()
    private lateinit var binding: ModelsBinding
    private val picker = registerForActivityResult(ActivityResultContracts.OpenDocumentTree()) { tree: Uri? ->
        if (tree != null) models.import(TreeSource(this, tree))
    }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        binding = ModelsBinding.inflate(layoutInflater)
        setContentView(binding.root)
        binding.toolbar.setNavigationOnClickListener { finish() }
        binding.list.layoutManager = LinearLayoutManager(this)
        binding.list.adapter = adapter
        binding.importModel.setOnClickListener { picker.launch(null) }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { models.state.collect(::show) } }
    }

    private fun show(state: ModelsUiState) {
        adapter.show(state.rows)
        val importing = state.import as? ImportState.Importing
        binding.importModel.isEnabled = importing == null
        binding.progress.isVisible = importing != null
        binding.progress.progress = importing?.step?.percent ?: 0
        binding.status.text = statusLine(state.import)
    }

    private fun statusLine(import: ImportState): String = when (import) {
        is ImportState.Idle -> ""
        is ImportState.Failed -> import.reason
        is ImportState.Importing -> when (val step = import.step) {
            is ImportStep.Copying -> getString(R.string.copying, import.name, step.percent)
            is ImportStep.Checking -> getString(R.string.checking, import.name, step.percent)
            null -> ""
        }
    }

    private class Holder(val binding: ModelBinding) : RecyclerView.ViewHolder(binding.root)

    private inner class Adapter : RecyclerView.Adapter<Holder>() {
        private var rows: List<ModelRow> = emptyList()

        fun show(rows: List<ModelRow>) {
            this.rows = rows
            notifyDataSetChanged()
        }

        override fun getItemCount() = rows.size

        override fun onCreateViewHolder(parent: ViewGroup, viewType: Int) = Holder(ModelBinding.inflate(layoutInflater, parent, false))

        override fun onBindViewHolder(holder: Holder, position: Int) {
            val row = rows[position]
            val model = row.folder.name
            val size = Formatter.formatShortFileSize(this@ModelsActivity, row.bytes)
            with(holder.binding) {
                name.text = getString(R.string.model_row, model, size)
                use.text = getString(if (row.selected) R.string.used else R.string.use)
                use.isEnabled = !row.selected
                use.setOnClickListener { models.use(row.folder) }
                delete.contentDescription = getString(R.string.delete, model)
                delete.setOnClickListener { models.delete(row.folder) }
            }
        }
    }
}
