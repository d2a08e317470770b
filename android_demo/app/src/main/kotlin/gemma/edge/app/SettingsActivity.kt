package gemma.edge.app

import android.os.Bundle
import android.widget.TextView
import androidx.appcompat.app.AppCompatActivity
import com.google.android.material.appbar.MaterialToolbar
import com.google.android.material.button.MaterialButton
import gemma.edge.InputException

/** Temperature, filters, length and system prompt; says at once what is wrong with a number. */
class SettingsActivity : AppCompatActivity() {
    private val store by lazy { SettingsStore(this) }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.settings)
        findViewById<MaterialToolbar>(R.id.toolbar).setNavigationOnClickListener { finish() }
        // after a rotation the fields hold what was typed
        if (savedInstanceState == null) show(store.load())
        findViewById<MaterialButton>(R.id.save).setOnClickListener { save() }
    }

    private fun show(settings: Settings) {
        field(R.id.temperature).text = settings.temperature.toString()
        field(R.id.top_k).text = settings.topK.toString()
        field(R.id.top_p).text = settings.topP.toString()
        field(R.id.max_tokens).text = settings.maxTokens.toString()
        field(R.id.system_prompt).text = settings.systemPrompt
    }

    private fun save() = try {
        val typed = typed()
        typed.sampling // refuses what no filter can take
        store.save(typed)
        finish()
    } catch (error: InputException) {
        field(R.id.error).text = error.message
    }

    private fun typed() = Settings(
        temperature = number(R.id.temperature, R.string.temperature, String::toDoubleOrNull),
        topK = number(R.id.top_k, R.string.top_k, String::toIntOrNull),
        topP = number(R.id.top_p, R.string.top_p, String::toDoubleOrNull),
        maxTokens = number(R.id.max_tokens, R.string.max_tokens) { it.toIntOrNull()?.takeIf { tokens -> tokens > 0 } },
        systemPrompt = field(R.id.system_prompt).text.toString().trim(),
    )

    private fun <T> number(id: Int, name: Int, read: (String) -> T?): T {
        val text = field(id).text.toString()
        return read(text) ?: throw InputException("${getString(name)}: '$text' is not a number that it can be")
    }

    private fun field(id: Int): TextView = findViewById(id)
}
