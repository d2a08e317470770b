package gemma.edge.app

import android.app.Application
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.text.format.DateUtils
import android.view.View
import android.widget.PopupMenu
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.core.view.isVisible
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.lifecycle.viewModelScope
import androidx.recyclerview.widget.LinearLayoutManager
import gemma.edge.app.databinding.ConversationBinding
import gemma.edge.app.databinding.ConversationsBinding
import gemma.edge.app.views.RowAdapter
import gemma.edge.app.views.askText
import gemma.edge.app.views.confirmDelete
import gemma.edge.app.views.share
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** What the screen of conversations shows; [rows] is null until they were read. */
data class ConversationsUiState(val rows: List<Conversation>? = null, val failure: String? = null)

/** Lists, renames, deletes and exports conversations. */
class ConversationsViewModel(application: Application) : AndroidViewModel(application) {
    private val store = ConversationStore(File(application.filesDir, ChatViewModel.CONVERSATIONS))
    private val mutable = MutableStateFlow(ConversationsUiState())

    val state: StateFlow<ConversationsUiState> = mutable.asStateFlow()

    init {
        change {}
    }

    fun rename(id: String, title: String) = change { store.rename(id, title) }

    fun delete(id: String) = change { store.delete(id) }

    /** Write a conversation into a file that the user chose. */
    fun export(conversation: Conversation, file: Uri) = change {
        val application = getApplication<Application>()
        val text = conversation.toMarkdown(application.getString(R.string.you))
        application.contentResolver.openOutputStream(file, "wt")?.use { it.write(text.toByteArray()) }
    }

    private fun change(act: () -> Unit) {
        viewModelScope.launch {
            mutable.value = withContext(Dispatchers.IO) {
                val failure = failureOf(act)
                ConversationsUiState(store.list(), failure)
            }
        }
    }
}

/** The screen of conversations. Its result is the id of the one to go on with, in the extra [ID]. */
class ConversationsActivity : AppCompatActivity() {
    val conversations: ConversationsViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private val adapter =
        RowAdapter({ ConversationBinding.inflate(layoutInflater, it, false) }, { it.root }) { row: Conversation -> show(row) }
    private lateinit var binding: ConversationsBinding
    private var exported: Conversation? = null
    private val file = registerForActivityResult(ActivityResultContracts.CreateDocument("text/markdown")) { uri: Uri? ->
        val conversation = exported
        if (uri != null && conversation != null) conversations.export(conversation, uri)
    }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        binding = ConversationsBinding.inflate(layoutInflater)
        setContentView(binding.root)
        binding.toolbar.setNavigationOnClickListener { finish() }
        binding.list.layoutManager = LinearLayoutManager(this)
        binding.list.adapter = adapter
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { conversations.state.collect(::show) } }
    }

    private fun show(state: ConversationsUiState) {
        adapter.show(state.rows.orEmpty())
        val none = state.rows?.isEmpty() == true
        binding.status.isVisible = none || state.failure != null
        binding.status.text = state.failure ?: getString(R.string.no_conversations)
    }

    private fun openMenu(view: View, conversation: Conversation) {
        val menu = PopupMenu(this, view)
        menu.inflate(R.menu.conversation)
        menu.setOnMenuItemClickListener { item -> actOn(conversation, item.itemId) }
        menu.show()
    }

    /** Do what the user chose in a conversation's menu. */
    fun actOn(conversation: Conversation, item: Int): Boolean {
        when (item) {
            R.id.rename -> askText(getString(R.string.rename), conversation.title) { conversations.rename(conversation.id, it) }
            R.id.share -> share(conversation.toMarkdown(getString(R.string.you)))
            R.id.export -> file.launch("${conversation.title.filter { it.isLetterOrDigit() || it == ' ' }.trim()}.md".also { exported = conversation })
            R.id.remove -> confirmDelete(conversation.title) { conversations.delete(conversation.id) }
            else -> return false
        }
        return true
    }

    private fun ConversationBinding.show(row: Conversation) {
        name.text = row.title
        details.text = getString(R.string.model_row, row.model, DateUtils.getRelativeTimeSpanString(row.changedMs))
        root.setOnClickListener {
            setResult(RESULT_OK, Intent().putExtra(ID, row.id))
            finish()
        }
        more.contentDescription = getString(R.string.more, row.title)
        more.setOnClickListener { openMenu(more, row) }
    }

    companion object {
        const val ID = "id"
    }
}
