package gemma.edge.app

import android.app.Application
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.viewModelScope
import gemma.edge.AnswerStats
import gemma.edge.GemmaSession
import gemma.edge.Message
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** One message on the screen. A finished answer has [stats], which are shown below it. */
data class ChatMessage(val byUser: Boolean, val text: String, val stats: AnswerStats? = null)

/** What the model of the chat is doing. */
sealed interface ModelState {
    /** The name of the model; empty while there is none. */
    val name: String

    /** The app has just started and does not know yet which model was chosen. */
    data object Starting : ModelState {
        override val name = ""
    }

    /** There is no model on the device. */
    data object Missing : ModelState {
        override val name = ""
    }

    /** The model is being loaded. */
    data class Loading(override val name: String) : ModelState

    /** The model waits for a message. [failure] says why the last message was not answered. */
    data class Ready(override val name: String, val failure: String? = null) : ModelState

    /** The model is answering. */
    data class Answering(override val name: String) : ModelState

    /** The model cannot be used. */
    data class Failed(override val name: String, val reason: String) : ModelState
}

/** What the chat screen shows. */
data class ChatUiState(val model: ModelState = ModelState.Starting, val messages: List<ChatMessage> = emptyList())

/** The conversation. It survives a rotation as a view model, and the end of the process in [saved]. */
class ChatViewModel(application: Application, private val saved: SavedStateHandle) : AndroidViewModel(application) {
    private val engine = application.engine
    private val store = BundleStore(application)
    private val settings = SettingsStore(application)
    private val mutable = MutableStateFlow(ChatUiState(messages = savedMessages()))
    private var session: GemmaSession? = null
    private var work: Job? = null

    val state: StateFlow<ChatUiState> = mutable.asStateFlow()

    /** Load the chosen model unless it is loaded already. The screen calls this whenever it comes to the front. */
    fun load() {
        if (work?.isActive == true) return
        work = viewModelScope.launch {
            val failure = failureOf {
                val folder = withContext(Dispatchers.IO) {
                    store.installDemo()
                    store.selected()
                }
                if (folder == null) show(ModelState.Missing) else open(folder)
            }
            if (failure != null) show(ModelState.Failed(mutable.value.model.name, failure))
        }
    }

    /** Send a message. Nothing happens while an answer is being given or before the model is loaded. */
    fun send(text: String) {
        val session = session
        if (text.isBlank() || session == null || work?.isActive == true) return
        val model = mutable.value.model.name
        val history = mutable.value.messages + ChatMessage(byUser = true, text = text)
        mutable.value = ChatUiState(ModelState.Answering(model), history + ChatMessage(byUser = false, text = ""))
        work = viewModelScope.launch {
            var answer = ""
            var failure: String? = null
            try {
                failure = failureOf {
                    val chosen = settings.load()
                    if (history.size == 1) saved[SYSTEM_PROMPT] = chosen.systemPrompt
                    val turn = if (history.size == 1) withSystemPrompt(text) else text
                    session.send(turn, chosen.sampling, chosen.maxTokens).collect { piece ->
                        answer += piece
                        show(history + ChatMessage(byUser = false, text = answer))
                    }
                }
            } finally {
                // without a text the model could not begin to answer, and the session does not keep the turn either
                show(if (answer.isEmpty()) history.dropLast(1) else history + ChatMessage(false, answer, session.stats))
                show(ModelState.Ready(model, failure))
            }
        }
    }

    /** End the answer. The text that is on the screen stays in the conversation. */
    fun stop() {
        if (mutable.value.model is ModelState.Answering) work?.cancel()
    }

    /** Forget the conversation. */
    fun newChat() {
        stop()
        val running = work
        work = viewModelScope.launch {
            running?.join()
            session?.reset()
            show(emptyList())
            val model = mutable.value.model
            if (model is ModelState.Ready) show(model.copy(failure = null))
        }
    }

    private suspend fun open(folder: File) {
        if (session?.bundle?.folder != folder) show(ModelState.Loading(folder.name))
        val opened = engine.open(folder)
        if (opened !== session) {
            opened.restore(mutable.value.messages.mapIndexed { index, message ->
                val text = if (index == 0) withSystemPrompt(message.text) else message.text
                Message(if (message.byUser) "user" else "assistant", text)
            })
            session = opened
        }
        show(ModelState.Ready(folder.name))
    }

    /** The first message with the system prompt before it, because Gemma's chat format has no system role. */
    private fun withSystemPrompt(text: String): String {
        val prompt = saved.get<String>(SYSTEM_PROMPT).orEmpty()
        return if (prompt.isBlank()) text else "$prompt\n\n$text"
    }

    private fun show(model: ModelState) = mutable.update { it.copy(model = model) }

    private fun show(messages: List<ChatMessage>) {
        mutable.update { it.copy(messages = messages) }
        saved[TEXTS] = ArrayList(messages.map { it.text })
    }

    /** The messages of the process that ended. User and model take turns, so it is enough to save the texts. */
    private fun savedMessages(): List<ChatMessage> {
        val texts = saved.get<ArrayList<String>>(TEXTS).orEmpty()
        // if the process ended before an answer began, its question is dropped
        val whole = if (texts.size % 2 == 0) texts else texts.dropLast(1)
        return whole.mapIndexed { index, text -> ChatMessage(byUser = index % 2 == 0, text = text) }
    }

    private companion object {
        const val TEXTS = "texts"
        const val SYSTEM_PROMPT = "system_prompt"
    }
}
