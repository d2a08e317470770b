package gemma.edge.app

import android.content.Context
import gemma.edge.SamplingParams

/** The settings of the chat. Changed settings apply to the next answer. */
data class Settings(
    val temperature: Double = 0.7,
    val topK: Int = 64,
    val topP: Double = 0.95,
    val maxTokens: Int = 512,
    val systemPrompt: String = "",
) {
    /**
     * The sampling parameters of the library.
     *
     * @throws gemma.edge.InputException a number is out of range; the message is for the user.
     */
    val sampling: SamplingParams get() = SamplingParams(temperature = temperature, topK = topK, topP = topP)
}

/** Saves [Settings] on the device. */
class SettingsStore(context: Context) {
    private val preferences = context.getSharedPreferences("settings", Context.MODE_PRIVATE)

    fun load(): Settings = Settings().let { default ->
        Settings(
            temperature = preferences.getString(TEMPERATURE, null)?.toDoubleOrNull() ?: default.temperature,
            topK = preferences.getInt(TOP_K, default.topK),
            topP = preferences.getString(TOP_P, null)?.toDoubleOrNull() ?: default.topP,
            maxTokens = preferences.getInt(MAX_TOKENS, default.maxTokens),
            systemPrompt = preferences.getString(SYSTEM_PROMPT, null) ?: default.systemPrompt,
        )
    }

    fun save(settings: Settings) = preferences.edit()
        .putString(TEMPERATURE, settings.temperature.toString())
        .putInt(TOP_K, settings.topK)
        .putString(TOP_P, settings.topP.toString())
        .putInt(MAX_TOKENS, settings.maxTokens)
        .putString(SYSTEM_PROMPT, settings.systemPrompt)
        .apply()

    private companion object {
        const val TEMPERATURE = "temperature"
        const val TOP_K = "top_k"
        const val TOP_P = "top_p"
        const val MAX_TOKENS = "max_tokens"
        const val SYSTEM_PROMPT = "system_prompt"
    }
}
