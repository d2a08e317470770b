package gemma.edge.app

import android.content.Intent
import android.os.Bundle
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.core.view.isVisible
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.recyclerview.widget.LinearLayoutManager
import gemma.edge.app.databinding.ChatBinding
import kotlinx.coroutines.launch

/** The chat screen: it shows the [ChatUiState] and passes the user's actions on to the [ChatViewModel]. */
class ChatActivity : AppCompatActivity() {
    private val chat: ChatViewModel by viewModels()
    private val adapter = MessageAdapter()
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
            R.id.models -> startActivity(Intent(this, ModelsActivity::class.java))
            R.id.settings -> startActivity(Intent(this, SettingsActivity::class.java))
            R.id.benchmark -> startActivity(Intent(this, BenchmarkActivity::class.java))
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
