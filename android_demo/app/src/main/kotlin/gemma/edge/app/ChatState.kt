package gemma.edge.app

import gemma.edge.AnswerStats

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

/**
 * How full the model's context is.
 *
 * @property tokens read and written since the conversation began.
 * @property context tokens that the model can look back on.
 */
data class ContextMeter(val tokens: Int, val context: Int) {
    val percent: Int get() = minOf(100, (100L * tokens / context).toInt())
}

/**
 * The engines of a model that the app has.
 *
 * @property names backends, in the order in which they are tried.
 * @property chosen the one that the user chose; null for the first.
 */
data class EngineChoice(val names: List<String>, val chosen: String?)

/** What the chat screen shows; [meter] is null while no model is loaded. */
data class ChatUiState(
    val model: ModelState = ModelState.Starting,
    val messages: List<ChatMessage> = emptyList(),
    val meter: ContextMeter? = null,
    val engines: EngineChoice = EngineChoice(emptyList(), null),
)
