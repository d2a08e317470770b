package gemma.edge.app

import android.Manifest
import android.content.Intent
import android.net.Uri
import android.os.Build
import android.os.Bundle
import android.text.format.Formatter
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.core.view.isVisible
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.recyclerview.widget.LinearLayoutManager
import gemma.edge.app.bundles.ImportRequest
import gemma.edge.app.bundles.ImportRequest.Kind
import gemma.edge.app.bundles.ImportService
import gemma.edge.app.bundles.ImportState
import gemma.edge.app.databinding.ModelBinding
import gemma.edge.app.databinding.ModelsBinding
import gemma.edge.app.views.RowAdapter
import gemma.edge.app.views.askText
import gemma.edge.app.views.confirmDelete
import kotlinx.coroutines.launch

/** The models screen: it shows the [ModelsUiState] and passes the user's actions on to the [ModelsViewModel]. */
class ModelsActivity : AppCompatActivity() {
    val models: ModelsViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private val adapter = RowAdapter({ ModelBinding.inflate(layoutInflater, it, false) }, { it.root }) { row: ModelRow -> show(row) }
    private lateinit var binding: ModelsBinding
    private val picker = registerForActivityResult(ActivityResultContracts.OpenDocumentTree()) { tree: Uri? ->
        if (tree != null) import(Kind.FOLDER, tree)
    }
    private val zipPicker = registerForActivityResult(ActivityResultContracts.OpenDocument()) { file: Uri? ->
        if (file != null) import(Kind.ZIP, file)
    }
    private val notifying = registerForActivityResult(ActivityResultContracts.RequestPermission()) {} // without it nothing is shown, but imported

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        binding = ModelsBinding.inflate(layoutInflater)
        setContentView(binding.root)
        binding.toolbar.setNavigationOnClickListener { finish() }
        binding.list.layoutManager = LinearLayoutManager(this)
        binding.list.adapter = adapter
        binding.importModel.setOnClickListener { picker.launch(null) }
        binding.importZip.setOnClickListener { zipPicker.launch(arrayOf("application/zip")) }
        binding.download.setOnClickListener { askText(getString(R.string.address), "https://") { import(ImportRequest(Kind.DOWNLOAD, it)) } }
        binding.stopImport.setOnClickListener { startService(ImportService.stopIntent(this)) }
        binding.goOn.setOnClickListener { models.state.value.last?.let(::import) }
        binding.removeLeftovers.setOnClickListener { models.removeLeftovers() }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { models.state.collect(::show) } }
    }

    /** Import what the user chose; the permission to read it outlives the process, so that a later one can go on. */
    private fun import(kind: Kind, chosen: Uri) {
        try {
            contentResolver.takePersistableUriPermission(chosen, Intent.FLAG_GRANT_READ_URI_PERMISSION)
        } catch (_: SecurityException) {
            // not every app that offers files lets the permission last
        }
        import(ImportRequest(kind, chosen.toString()))
    }

    private fun import(request: ImportRequest) {
        if (Build.VERSION.SDK_INT >= 33) notifying.launch(Manifest.permission.POST_NOTIFICATIONS)
        models.import(request)
    }

    private fun show(state: ModelsUiState) {
        adapter.show(state.rows)
        val importing = state.import as? ImportState.Importing
        for (button in listOf(binding.importModel, binding.importZip, binding.download)) button.isEnabled = importing == null
        val leftovers = state.leftovers.isNotEmpty() && importing == null
        binding.leftovers.isVisible = leftovers
        binding.leftovers.text = getString(R.string.leftovers, state.leftovers.joinToString())
        binding.removeLeftovers.isVisible = leftovers
        binding.goOn.isVisible = leftovers && state.last != null
        binding.stopImport.isVisible = importing != null
        binding.progress.isVisible = importing != null
        binding.progress.progress = importing?.step?.percent ?: 0
        binding.status.text = statusLine(state.import)
    }

    private fun statusLine(import: ImportState): String = when (import) {
        is ImportState.Idle -> ""
        is ImportState.Failed -> import.reason
        is ImportState.Importing -> import.describe(this)
    }

    private fun ModelBinding.show(row: ModelRow) {
        val model = row.folder.name
        val size = Formatter.formatShortFileSize(this@ModelsActivity, row.bytes)
        name.text = getString(R.string.model_row, model, size)
        use.text = getString(if (row.selected) R.string.used else R.string.use)
        use.isEnabled = !row.selected
        use.setOnClickListener { models.use(row.folder) }
        delete.contentDescription = getString(R.string.delete, model)
        delete.setOnClickListener { confirmDelete(model) { models.delete(row.folder) } }
    }
}
