package gemma.edge.app

import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.TextView
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.recyclerview.widget.LinearLayoutManager
import androidx.recyclerview.widget.RecyclerView
import com.google.android.material.appbar.MaterialToolbar
import com.google.android.material.button.MaterialButton
import com.google.android.material.textfield.TextInputEditText
import kotlinx.coroutines.launch

/** The chat screen: shows [ChatState], passes on what is pressed. */
class ChatActivity : AppCompatActivity() {
    private val chat: ChatViewModel by viewModels()
    private val adapter = MessageAdapter()

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.chat)
        val messages = findViewById<RecyclerView>(R.id.messages)
        messages.layoutManager = LinearLayoutManager(this).apply { stackFromEnd = true }
        messages.adapter = adapter
        messages.itemAnimator = null // a text that grows would flicker
        findViewById<MaterialToolbar>(R.id.toolbar).setOnMenuItemClickListener { item -> chosen(item.itemId) }
        val input = findViewById<TextInputEditText>(R.id.input)
        findViewById<MaterialButton>(R.id.send).setOnClickListener {
            if (chat.state.value.answering) {
                chat.stop()
            } else {
                chat.send(input.text.toString().trim())
                input.setText("")
            }
        }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { chat.state.collect(::show) } }
    }

    override fun onStart() {
        super.onStart()
        chat.load()
    }

    private fun chosen(item: Int): Boolean {
        when (item) {
            R.id.new_chat -> chat.newChat()
            R.id.models -> startActivity(Intent(this, ModelsActivity::class.java))
            R.id.settings -> startActivity(Intent(this, SettingsActivity::class.java))
            R.id.benchmark -> startActivity(Intent(this, BenchmarkActivity::class.java))
            else -> return false
        }
        return true
    }

    private fun show(state: ChatState) {
        findViewById<MaterialToolbar>(R.id.toolbar).subtitle = state.model
        findViewById<View>(R.id.busy).visibility = if (state.loading || state.answering) View.VISIBLE else View.GONE
        val status = findViewById<TextView>(R.id.status)
        val line = statusLine(state)
        if (status.text.toString() != line) status.text = line // said once, not with every token
        status.visibility = if (line.isEmpty()) View.GONE else View.VISIBLE
        findViewById<MaterialButton>(R.id.send).apply {
            setIconResource(if (state.answering) R.drawable.stop else R.drawable.send)
            contentDescription = getString(if (state.answering) R.string.stop else R.string.send)
            isEnabled = state.answering || state.ready
        }
        adapter.model = state.model
        adapter.submitList(state.messages) {
            if (state.messages.isNotEmpty()) findViewById<RecyclerView>(R.id.messages).scrollToPosition(state.messages.size - 1)
        }
    }

    private fun statusLine(state: ChatState): String = when {
        state.failure != null -> state.failure
        state.loading && state.model.isNotEmpty() -> getString(R.string.loading, state.model)
        state.loading -> ""
        state.model.isEmpty() -> getString(R.string.no_model)
        state.messages.isEmpty() -> getString(R.string.empty_chat)
        else -> ""
    }
}
