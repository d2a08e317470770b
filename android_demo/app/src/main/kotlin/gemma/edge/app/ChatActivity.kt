package gemma.edge.app

import android.content.ClipData
import android.content.ClipboardManager
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.PopupMenu
import androidx.activity.result.contract.ActivityResultContracts
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.core.view.isVisible
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.recyclerview.widget.LinearLayoutManager
import gemma.edge.app.databinding.ChatBinding
import gemma.edge.app.views.Heat
import gemma.edge.app.views.MessageAdapter
import gemma.edge.app.views.askChoice
import gemma.edge.app.views.share
import kotlinx.coroutines.launch

/** The chat screen: it shows the [ChatUiState] and passes the user's actions on to the [ChatViewModel]. */
class ChatActivity : AppCompatActivity() {
    private val chat: ChatViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private val adapter = MessageAdapter(::openMessageMenu)
    private val heat by lazy { Heat(this) { binding.heat.setText(it ?: R.string.app_name); binding.heat.isVisible = it != null } }
    private val list = registerForActivityResult(ActivityResultContracts.StartActivityForResult()) { result ->
        result.data?.getStringExtra(ConversationsActivity.ID)?.let(chat::open)
    }
    private lateinit var binding: ChatBinding

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        binding = ChatBinding.inflate(layoutInflater)
        setContentView(binding.root)
        binding.messages.layoutManager = LinearLayoutManager(this).apply { stackFromEnd = true }
        binding.messages.adapter = adapter
        binding.messages.itemAnimator = null // an animated message would flicker while its text grows
        binding.toolbar.setOnMenuItemClickListener { item -> openMenuItem(item.itemId) }
        binding.send.setOnClickListener { sendOrStop() }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { chat.state.collect(::show) } }
    }

    override fun onStart() {
        super.onStart()
        chat.load()
        heat.start()
    }

    override fun onStop() {
        heat.stop()
        super.onStop()
    }

    private fun sendOrStop() {
        if (chat.state.value.model is ModelState.Answering) {
            chat.stop()
        } else {
            chat.send(binding.input.text.toString().trim())
            binding.input.setText("")
        }
    }

    private fun openMenuItem(item: Int): Boolean {
        when (item) {
            R.id.new_chat -> chat.newChat()
            R.id.conversations -> list.launch(Intent(this, ConversationsActivity::class.java))
            R.id.engine -> chooseEngine(chat.state.value.engines)
            R.id.models -> startActivity(Intent(this, ModelsActivity::class.java))
            R.id.settings -> startActivity(Intent(this, SettingsActivity::class.java))
            R.id.benchmark -> startActivity(Intent(this, BenchmarkActivity::class.java))
            else -> return false
        }
        return true
    }

    private fun chooseEngine(engines: EngineChoice) {
        val names = listOf(getString(R.string.first_engine)) + engines.names
        askChoice(getString(R.string.engine), names, engines.chosen?.let { names.indexOf(it) } ?: 0) { index ->
            chat.chooseEngine(if (index == 0) null else names[index])
        }
    }

    private fun openMessageMenu(view: View, place: Int) {
        val message = chat.state.value.messages.getOrNull(place) ?: return
        val menu = PopupMenu(this, view)
        menu.inflate(R.menu.message)
        val last = place == chat.state.value.messages.lastIndex && !message.byUser
        menu.menu.findItem(R.id.regenerate).isVisible = last && chat.state.value.model is ModelState.Ready
        menu.setOnMenuItemClickListener { item -> actOn(message, item.itemId) }
        menu.show()
    }

    /** Do what the user chose in a message's menu. */
    fun actOn(message: ChatMessage, item: Int): Boolean {
        when (item) {
            R.id.copy -> getSystemService(ClipboardManager::class.java).setPrimaryClip(ClipData.newPlainText(null, message.text))
            R.id.share -> share(message.text)
            R.id.regenerate -> chat.regenerate()
            else -> return false
        }
        return true
    }

    private fun show(state: ChatUiState) {
        val model = state.model
        val answering = model is ModelState.Answering
        binding.toolbar.subtitle = model.name
        binding.busy.isVisible = answering || model is ModelState.Loading || model is ModelState.Starting
        val line = statusLine(state)
        // TalkBack reads the line whenever it is set, so it is not set again with every token
        if (binding.status.text.toString() != line) binding.status.text = line
        binding.status.isVisible = line.isNotEmpty()
        binding.send.setIconResource(if (answering) R.drawable.stop else R.drawable.send)
        binding.send.contentDescription = getString(if (answering) R.string.stop else R.string.send)
        binding.send.isEnabled = answering || model is ModelState.Ready
        binding.meter.isVisible = state.meter != null
        state.meter?.let { meter ->
            val text = if (meter.tokens > meter.context) R.string.context_full else R.string.context
            binding.meter.text = getString(text, meter.tokens, meter.context)
            binding.meterBar.progress = meter.percent
        }
        binding.meterBar.isVisible = state.meter != null
        adapter.modelName = model.name
        adapter.submitList(state.messages) {
            if (state.messages.isNotEmpty()) binding.messages.scrollToPosition(state.messages.size - 1)
        }
    }

    private fun statusLine(state: ChatUiState): String = when (val model = state.model) {
        is ModelState.Starting -> ""
        is ModelState.Missing -> getString(R.string.no_model)
        is ModelState.Loading -> getString(R.string.loading, model.name)
        is ModelState.Failed -> model.reason
        is ModelState.Answering -> ""
        is ModelState.Ready -> model.failure ?: if (state.messages.isEmpty()) getString(R.string.empty_chat) else ""
    }
}
