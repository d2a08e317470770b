package gemma.edge.app

import android.app.Application
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
import gemma.edge.GemmaSession
import gemma.edge.Message
import gemma.edge.StateException
import gemma.edge.app.bundles.BundleStore
import java.io.File
import java.io.FileNotFoundException
import java.io.IOException
import java.util.UUID
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/**
 * The conversation on the screen. After each answer it is written to the device with the model's state, so it goes on where it was after
 * a rotation, after the model was let go, and after the end of the process.
 */
class ChatViewModel(application: Application) : AndroidViewModel(application), SessionHolder {
    private val engine = application.engine
    private val store = BundleStore(application)
    private val settings = SettingsStore(application)
    private val conversations = ConversationStore(File(application.filesDir, CONVERSATIONS))
    private val mutable = MutableStateFlow(ChatUiState())
    private var conversation: Conversation? = null // null until it was read from the device
    private var session: GemmaSession? = null
    private var work: Job? = null

    val state: StateFlow<ChatUiState> = mutable.asStateFlow()

    init {
        engine.add(this)
    }

    override fun onCleared() = engine.remove(this)

    override val isBusy: Boolean get() = work?.isActive == true

    /** The model goes, and comes back with the next message or the screen. */
    override suspend fun letGo() {
        stop()
        work?.join()
        session = null
        mutable.update { it.copy(meter = null) }
    }

    /** Load the chosen model and the last conversation unless they are loaded. The screen calls this whenever it comes to the front. */
    fun load() {
        if (work?.isActive == true) return
        work = viewModelScope.launch {
            val failure = failureOf { loaded() }
            if (failure != null) show(ModelState.Failed(mutable.value.model.name, failure))
        }
    }

    /** Send a message. Nothing happens while an answer is being given or before a model was loaded. */
    fun send(text: String) {
        if (text.isBlank() || mutable.value.model !is ModelState.Ready || work?.isActive == true) return
        work = viewModelScope.launch { answer(text) }
    }

    /** Take the last answer back and have another one given. */
    fun regenerate() {
        val messages = mutable.value.messages
        if (messages.size < 2 || mutable.value.model !is ModelState.Ready || work?.isActive == true) return
        work = viewModelScope.launch {
            val kept = messages.dropLast(2)
            show(kept)
            conversation = conversation?.copy(messages = kept)
            session?.restore(spoken(kept))
            answer(messages[messages.size - 2].text)
        }
    }

    /** End the answer. The text that is on the screen stays in the conversation. */
    fun stop() {
        if (mutable.value.model is ModelState.Answering) work?.cancel()
    }

    /** Begin a new conversation. The one on the screen stays in the list. */
    fun newChat() = afterWork { switchTo(Conversation(UUID.randomUUID().toString())) }

    /** Show a conversation of the list and go on with it. */
    fun open(id: String) = afterWork {
        withContext(Dispatchers.IO) { conversations.load(id) }?.let { switchTo(it) }
    }

    /** Let a backend of the model answer from now on; null takes the first one that has an engine. */
    fun chooseEngine(backend: String?) = afterWork {
        val folder = withContext(Dispatchers.IO) { store.selected() } ?: return@afterWork
        store.chooseBackend(folder, backend)
        loaded()
    }

    /** End the answer, if one is being given, and do something after it. */
    private fun afterWork(act: suspend () -> Unit) {
        stop()
        val running = work
        work = viewModelScope.launch {
            running?.join()
            val failure = failureOf { act() }
            if (failure != null) show(ModelState.Failed(mutable.value.model.name, failure))
        }
    }

    private suspend fun switchTo(next: Conversation) {
        conversation = next
        store.rememberConversation(next.id)
        show(next.messages)
        session?.let { resume(it) }
        val model = mutable.value.model
        if (model is ModelState.Ready) show(model.copy(failure = null))
    }

    /** Show the conversation and open the chosen model with it, if there is one. */
    private suspend fun loaded() {
        val folder = withContext(Dispatchers.IO) {
            store.installDemo()
            conversation = conversation?.takeIf { it.messages.isEmpty() || conversations.load(it.id) != null } ?: lastConversation()
            store.selected()
        }
        show(conversation!!.messages)
        if (folder == null) return show(ModelState.Missing)
        if (session?.bundle?.folder != folder) show(ModelState.Loading(folder.name))
        opened(folder)
        show(ModelState.Ready(folder.name))
    }

    /** The session of a bundle, with the conversation in it. */
    private suspend fun opened(folder: File): GemmaSession {
        val names = withContext(Dispatchers.IO) { Engine.backendsOf(folder) }
        val backend = store.backend(folder, names)
        val opened = engine.open(folder, backend)
        session = opened
        resume(opened)
        mutable.update { it.copy(meter = meterOf(opened), engines = EngineChoice(names, backend)) }
        return opened
    }

    private fun lastConversation() = store.lastConversation()?.let(conversations::load) ?: Conversation(UUID.randomUUID().toString())

    /** Have the model know the conversation: by its saved state, or, where that does not fit, by reading all of it with the next message. */
    private suspend fun resume(session: GemmaSession) {
        val current = conversation ?: return
        val expected = spoken(current.messages)
        if (session.messages == expected) return
        val known = try {
            if (expected.isNotEmpty()) session.load(conversations.stateOf(current.id))
            session.messages == expected
        } catch (_: StateException) {
            false
        }
        if (!known) session.restore(expected)
        mutable.update { it.copy(meter = meterOf(session)) }
    }

    private suspend fun answer(text: String) {
        val model = mutable.value.model.name
        val chosen = settings.load()
        val before = conversation!!.let { if (it.messages.isEmpty()) it.copy(title = Conversation.titleOf(text), systemPrompt = chosen.systemPrompt) else it }
        conversation = before
        val history = before.messages + ChatMessage(byUser = true, text = text)
        mutable.update { it.copy(model = ModelState.Answering(model), messages = history + ChatMessage(byUser = false, text = "")) }
        var answer = ""
        var failure: String? = null
        try {
            failure = failureOf {
                val session = session ?: reopened()
                session.send(spoken(history).last().content, chosen.sampling, chosen.maxTokens).collect { piece ->
                    answer += piece
                    mutable.update { it.copy(messages = history + ChatMessage(byUser = false, text = answer), meter = meterOf(session)) }
                }
            }
        } finally {
            // without a text the model could not begin to answer, and the session does not keep the turn either
            val said = if (answer.isEmpty()) before.messages else history + ChatMessage(false, answer, session?.stats)
            val lost = withContext(NonCancellable) { failureOf { keep(before.copy(messages = said, model = model)) } }
            mutable.update { it.copy(model = ModelState.Ready(model, failure ?: lost), messages = said, meter = session?.let(::meterOf)) }
        }
    }

    /** The model, which was let go. */
    private suspend fun reopened(): GemmaSession {
        val folder = withContext(Dispatchers.IO) { store.selected() }
        return opened(folder ?: throw FileNotFoundException(getApplication<Application>().getString(R.string.no_model)))
    }

    /** Write the conversation and the model's state to the device. */
    private suspend fun keep(said: Conversation) {
        conversation = said
        if (said.messages.isEmpty()) return
        conversation = said.copy(changedMs = System.currentTimeMillis())
        withContext(Dispatchers.IO) {
            conversations.save(conversation!!)
            store.rememberConversation(said.id)
            try {
                session?.save(conversations.stateOf(said.id))
            } catch (error: IOException) {
                conversations.stateOf(said.id).delete() // it is of an earlier turn; the next start reads the conversation again
                throw error
            }
        }
    }

    /** What was said as the model reads it: the system prompt goes before the first message, because Gemma has no system role. */
    private fun spoken(messages: List<ChatMessage>): List<Message> {
        val prompt = conversation?.systemPrompt.orEmpty()
        return messages.mapIndexed { index, message ->
            val text = if (index == 0 && prompt.isNotBlank()) "$prompt\n\n${message.text}" else message.text
            Message(if (message.byUser) "user" else "assistant", text)
        }
    }

    private fun meterOf(session: GemmaSession) = ContextMeter(session.position, session.backend.cache.context)

    private fun show(model: ModelState) = mutable.update { it.copy(model = model) }

    /** Show other messages; the same ones keep their numbers, which are not on the device. */
    private fun show(messages: List<ChatMessage>) = mutable.update { shown ->
        if (shown.messages.map { it.text } == messages.map { it.text }) shown else shown.copy(messages = messages)
    }

    companion object {
        /** The folder of the conversations in the app's files. */
        const val CONVERSATIONS = "conversations"
    }
}
