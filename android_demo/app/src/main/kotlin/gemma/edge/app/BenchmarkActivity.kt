package gemma.edge.app

import android.app.Application
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.view.WindowManager
import android.widget.TextView
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.viewModelScope
import com.google.android.material.appbar.MaterialToolbar
import com.google.android.material.button.MaterialButton
import com.google.android.material.progressindicator.LinearProgressIndicator
import gemma.edge.Benchmark
import gemma.edge.BenchmarkSettings
import gemma.edge.InputException
import java.io.File
import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import org.json.JSONArray
import org.json.JSONObject

/** Medians of a result, for the screen; the file has every sample. */
data class BenchmarkNumbers(val prefillTokensPerS: Double, val decodeTokensPerS: Double, val ttftMs: Double)

/** What the benchmark screen shows. */
data class BenchmarkState(
    val running: Boolean = false,
    val done: Int = 0,
    val of: Int = 0,
    val numbers: BenchmarkNumbers? = null,
    val file: File? = null,
    val failure: String? = null,
)

/** Runs one benchmark at a time, also while the screen rotates. */
class BenchmarkViewModel(application: Application) : AndroidViewModel(application) {
    private val mutable = MutableStateFlow(BenchmarkState())
    private val folder: File get() = File(getApplication<Application>().getExternalFilesDir(null), "bench").also { it.mkdirs() }

    val state: StateFlow<BenchmarkState> = mutable.asStateFlow()

    /**
     * Measure, and write `bench/NAME` in the app's external files.
     *
     * @param bundle a folder, or null for the model that the chat uses.
     */
    fun run(bundle: File?, settings: BenchmarkSettings, name: String) {
        if (mutable.value.running) return
        mutable.value = BenchmarkState(running = true, of = settings.warmup + settings.repeat)
        viewModelScope.launch {
            Engine.close() // a phone has no memory for two models
            mutable.value = withContext(Dispatchers.Default) { measured(bundle, settings, name) }
        }
    }

    /** Say why nothing was measured. */
    fun refuse(reason: String) {
        mutable.value = BenchmarkState(failure = reason)
    }

    private fun CoroutineScope.measured(bundle: File?, settings: BenchmarkSettings, name: String): BenchmarkState {
        val chosen = bundle ?: BundleStore(getApplication()).run { installDemo(); selected() } ?: return BenchmarkState(failure = "no model")
        val document = Benchmark(AndroidSystem(getApplication())).run(chosen, settings) { done ->
            ensureActive()
            mutable.update { it.copy(done = done) }
        }
        val file = File(folder, name)
        Benchmark.writeWhole(file, document)
        val result = JSONObject(document).getJSONArray("results").getJSONObject(0)
        val failure = result.getString("failure")
        return if (failure.isEmpty()) BenchmarkState(numbers = numbers(result, settings), file = file) else BenchmarkState(failure = failure, file = file)
    }

    private fun numbers(result: JSONObject, settings: BenchmarkSettings) = BenchmarkNumbers(
        prefillTokensPerS = settings.prefill / median(result.getJSONArray("prefill_s")),
        decodeTokensPerS = settings.decode / median(result.getJSONArray("decode_s")),
        ttftMs = 1e3 * median(result.getJSONArray("ttft_s")),
    )

    private fun median(samples: JSONArray): Double = List(samples.length(), samples::getDouble).sorted().let { it[it.size / 2] }
}

/**
 * The benchmark screen, also started by `adb shell am start` with `bundle`, `result` and the numbers of docs/benchmarking.md as
 * extras: then it measures at once.
 */
class BenchmarkActivity : AppCompatActivity() {
    val benchmark: BenchmarkViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.benchmark)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON) // a screen that goes off slows the processor down
        findViewById<MaterialToolbar>(R.id.toolbar).setNavigationOnClickListener { finish() }
        if (savedInstanceState == null) fill(BenchmarkSettings())
        findViewById<MaterialButton>(R.id.run).setOnClickListener { start { benchmark.run(null, typed(), timedName()) } }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { benchmark.state.collect(::show) } }
        if (savedInstanceState == null) asked(intent)
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        asked(intent)
    }

    private fun asked(intent: Intent) {
        val bundle = intent.getStringExtra("bundle") ?: return
        start {
            val default = BenchmarkSettings()
            val settings = BenchmarkSettings(
                threads = intent.getIntExtra("threads", 0).takeIf { it > 0 },
                prefill = intent.getIntExtra("prefill", default.prefill),
                decode = intent.getIntExtra("decode", default.decode),
                repeat = intent.getIntExtra("repeat", default.repeat),
                warmup = intent.getIntExtra("warmup", default.warmup),
                minutes = intent.getFloatExtra("minutes", 0f).toDouble(),
            )
            benchmark.run(File(bundle), settings, plainName(intent.getStringExtra("result") ?: timedName()))
        }
    }

    /** Any app can send an intent: the result stays in its folder. */
    private fun plainName(name: String): String =
        if (NAME.matches(name)) name else throw InputException("result '$name' is not a plain file name that ends with .json")

    private fun timedName() = SimpleDateFormat("yyyyMMdd-HHmmss", Locale.ROOT).format(Date()) + ".json"

    private fun start(act: () -> Unit) = try {
        act()
    } catch (error: InputException) {
        benchmark.refuse(error.message.orEmpty())
    }

    private fun fill(settings: BenchmarkSettings) {
        field(R.id.threads).text = (settings.threads ?: 0).toString()
        field(R.id.prefill).text = settings.prefill.toString()
        field(R.id.decode).text = settings.decode.toString()
        field(R.id.repeat).text = settings.repeat.toString()
    }

    private fun typed() = BenchmarkSettings(
        threads = number(R.id.threads).takeIf { it > 0 },
        prefill = number(R.id.prefill),
        decode = number(R.id.decode),
        repeat = number(R.id.repeat),
    )

    private fun number(id: Int): Int = field(id).text.toString().let { it.toIntOrNull() ?: throw InputException("'$it' is not a whole number") }

    private fun show(state: BenchmarkState) {
        findViewById<MaterialButton>(R.id.run).isEnabled = !state.running
        val progress = findViewById<LinearProgressIndicator>(R.id.progress)
        progress.visibility = if (state.running) View.VISIBLE else View.GONE
        progress.max = maxOf(state.of, 1)
        progress.progress = state.done
        val numbers = state.numbers
        field(R.id.result).text = when {
            state.running -> getString(R.string.running, state.done, state.of)
            numbers != null ->
                getString(R.string.bench_result, numbers.prefillTokensPerS, numbers.decodeTokensPerS, numbers.ttftMs, state.file?.name)
            else -> state.failure.orEmpty()
        }
    }

    private fun field(id: Int): TextView = findViewById(id)

    private companion object {
        val NAME = Regex("[\\w-][\\w.-]{0,100}\\.json")
    }
}
