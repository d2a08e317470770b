package gemma.edge.app

import android.app.Application
import android.os.Bundle
import androidx.activity.viewModels
import androidx.annotation.StringRes
import androidx.appcompat.app.AppCompatActivity
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import gemma.edge.InputException
import gemma.edge.app.databinding.SettingsBinding
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.launch

/** The settings as the user typed them. */
data class SettingsForm(
    val temperature: String,
    val topK: String,
    val topP: String,
    val maxTokens: String,
    val systemPrompt: String,
)

/** What the settings screen shows besides the fields, which hold what was typed. */
sealed interface SettingsUiState {
    /** The user is typing. */
    data object Editing : SettingsUiState

    /** A number cannot be used. */
    data class Rejected(val reason: String) : SettingsUiState

    /** The settings are saved, so the screen closes. */
    data object Saved : SettingsUiState
}

/** Checks and saves the settings. */
class SettingsViewModel(application: Application) : AndroidViewModel(application) {
    private val store = SettingsStore(application)
    private val mutable = MutableStateFlow<SettingsUiState>(SettingsUiState.Editing)

    val state: StateFlow<SettingsUiState> = mutable.asStateFlow()

    fun load(): Settings = store.load()

    /** Save what was typed, or say which number cannot be used. */
    fun save(form: SettingsForm) {
        mutable.value = try {
            val settings = read(form)
            settings.sampling // throws if the library refuses a number
            store.save(settings)
            SettingsUiState.Saved
        } catch (error: InputException) {
            SettingsUiState.Rejected(error.message.orEmpty())
        }
    }

    private fun read(form: SettingsForm) = Settings(
        temperature = number(form.temperature, R.string.temperature, String::toDoubleOrNull),
        topK = number(form.topK, R.string.top_k, String::toIntOrNull),
        topP = number(form.topP, R.string.top_p, String::toDoubleOrNull),
        maxTokens = number(form.maxTokens, R.string.max_tokens) { it.toIntOrNull()?.takeIf { tokens -> tokens > 0 } },
        systemPrompt = form.systemPrompt.trim(),
    )

    private fun <T> number(text: String, @StringRes name: Int, read: (String) -> T?): T {
        val field = getApplication<Application>().getString(name)
        return read(text) ?: throw InputException("$field: '$text' is not a number that can be used here")
    }
}

/** The settings screen: temperature, filters, length of an answer and system prompt. */
class SettingsActivity : AppCompatActivity() {
    private val settings: SettingsViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private lateinit var binding: SettingsBinding

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        binding = SettingsBinding.inflate(layoutInflater)
        setContentView(binding.root)
        binding.toolbar.setNavigationOnClickListener { finish() }
        // after a rotation the fields still hold what was typed
        if (savedInstanceState == null) fill(settings.load())
        binding.save.setOnClickListener { settings.save(typed()) }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { settings.state.collect(::show) } }
    }

    private fun fill(settings: Settings) {
        binding.temperature.setText(settings.temperature.toString())
        binding.topK.setText(settings.topK.toString())
        binding.topP.setText(settings.topP.toString())
        binding.maxTokens.setText(settings.maxTokens.toString())
        binding.systemPrompt.setText(settings.systemPrompt)
    }

    private fun typed() = SettingsForm(
        temperature = binding.temperature.text.toString(),
        topK = binding.topK.text.toString(),
        topP = binding.topP.text.toString(),
        maxTokens = binding.maxTokens.text.toString(),
        systemPrompt = binding.systemPrompt.text.toString(),
    )

    private fun show(state: SettingsUiState) {
        binding.error.text = (state as? SettingsUiState.Rejected)?.reason.orEmpty()
        if (state is SettingsUiState.Saved) finish()
    }
}
