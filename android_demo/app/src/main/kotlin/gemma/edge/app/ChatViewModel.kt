package gemma.edge.app

import android.app.Application
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.viewModelScope
import gemma.edge.AnswerStats
import gemma.edge.GemmaException
import gemma.edge.GemmaSession
import gemma.edge.Message
import java.io.File
import java.io.IOException
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** One bubble; [stats] stands under a finished answer. */
data class ChatMessage(val byUser: Boolean, val text: String, val stats: AnswerStats? = null)

/** What the chat screen shows. [model] is empty where there is none, [ready] says that it can answer; [failure] is one line for the user. */
data class ChatState(
    val model: String = "",
    val loading: Boolean = true,
    val ready: Boolean = false,
    val answering: Boolean = false,
    val messages: List<ChatMessage> = emptyList(),
    val failure: String? = null,
)

/** The conversation. Survives rotation as a view model, and the end of the process in [saved]. */
class ChatViewModel(application: Application, private val saved: SavedStateHandle) : AndroidViewModel(application) {
    private val store = BundleStore(application)
    private val settings = SettingsStore(application)
    private val mutable = MutableStateFlow(ChatState(messages = savedMessages()))
    private var session: GemmaSession? = null
    private var work: Job? = null

    val state: StateFlow<ChatState> = mutable.asStateFlow()

    /** Load the chosen model unless it is the one that is loaded; the screen calls it whenever it comes to the front. */
    fun load() {
        if (work?.isActive == true) return
        work = viewModelScope.launch {
            reporting {
                val folder = withContext(Dispatchers.IO) {
                    store.installDemo()
                    store.selected()
                }
                if (folder == null) mutable.update { it.copy(model = "", ready = false) } else open(folder)
            }
            mutable.update { it.copy(loading = false) }
        }
    }

    /** Say something, unless an answer is being given. */
    fun send(text: String) {
        val session = session
        if (text.isBlank() || session == null || work?.isActive == true) return
        val asked = mutable.value.messages + ChatMessage(byUser = true, text = text)
        mutable.update { it.copy(messages = asked + ChatMessage(byUser = false, text = ""), answering = true, failure = null) }
        work = viewModelScope.launch {
            var answer = ""
            try {
                reporting {
                    val chosen = settings.load()
                    if (asked.size == 1) saved[SYSTEM_PROMPT] = chosen.systemPrompt
                    val turn = if (asked.size == 1) withSystemPrompt(text) else text
                    session.send(turn, chosen.sampling, chosen.maxTokens).collect { piece ->
                        answer += piece
                        show(asked + ChatMessage(byUser = false, text = answer))
                    }
                }
            } finally {
                // an answer without a text: the model could not begin, so the turn did not happen
                show(if (answer.isEmpty()) asked.dropLast(1) else asked + ChatMessage(false, answer, session.stats))
                mutable.update { it.copy(answering = false) }
            }
        }
    }

    /** End the answer; what was said stands. */
    fun stop() {
        if (mutable.value.answering) work?.cancel()
    }

    /** Forget the conversation. */
    fun newChat() {
        val running = work
        running?.cancel()
        work = viewModelScope.launch {
            running?.join()
            session?.reset()
            show(emptyList())
            mutable.update { it.copy(failure = null) }
        }
    }

    private suspend fun open(folder: File) {
        if (session?.bundle?.folder != folder) mutable.update { it.copy(model = folder.name, loading = true, ready = false) }
        val opened = Engine.open(folder)
        if (opened !== session) {
            opened.restore(mutable.value.messages.mapIndexed { index, message ->
                val text = if (index == 0) withSystemPrompt(message.text) else message.text
                Message(if (message.byUser) "user" else "assistant", text)
            })
            session = opened
        }
        mutable.update { it.copy(ready = true, failure = null) }
    }

    /** Gemma has no system role: what would be there goes before the first message. */
    private fun withSystemPrompt(text: String): String {
        val prompt = saved.get<String>(SYSTEM_PROMPT).orEmpty()
        return if (prompt.isBlank()) text else "$prompt\n\n$text"
    }

    /** What a user can do something about becomes a line on the screen; anything else is a bug, and crashes. */
    private suspend fun reporting(act: suspend () -> Unit) {
        try {
            act()
        } catch (error: CancellationException) {
            throw error
        } catch (error: GemmaException) {
            mutable.update { it.copy(failure = error.message) }
        } catch (error: IOException) {
            mutable.update { it.copy(failure = error.message) }
        }
    }

    private fun show(messages: List<ChatMessage>) {
        mutable.update { it.copy(messages = messages) }
        saved[TEXTS] = ArrayList(messages.map { it.text })
    }

    /** User and model take turns, so the texts are enough. */
    private fun savedMessages(): List<ChatMessage> {
        val texts = saved.get<ArrayList<String>>(TEXTS).orEmpty()
        // the process ended before the answer began
        val whole = if (texts.size % 2 == 0) texts else texts.dropLast(1)
        return whole.mapIndexed { index, text -> ChatMessage(byUser = index % 2 == 0, text = text) }
    }

    private companion object {
        const val TEXTS = "texts"
        const val SYSTEM_PROMPT = "system_prompt"
    }
}
