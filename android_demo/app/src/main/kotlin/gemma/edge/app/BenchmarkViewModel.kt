package gemma.edge.app

import android.app.Application
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
import gemma.edge.Benchmark
import gemma.edge.BenchmarkSettings
import gemma.edge.app.bundles.BundleStore
import java.io.File
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import org.json.JSONArray
import org.json.JSONObject

/** The medians of a result, for the screen. The result's file has every sample. */
data class BenchmarkNumbers(val prefillTokensPerS: Double, val decodeTokensPerS: Double, val ttftMs: Double)

/** What the benchmark screen shows. */
sealed interface BenchmarkUiState {
    /** Nothing was measured yet. */
    data object Idle : BenchmarkUiState

    /** A benchmark is running: [done] of [total] repetitions are done, warm-ups included. */
    data class Running(val done: Int, val total: Int) : BenchmarkUiState

    /** A benchmark has ended; [file] holds its result. */
    data class Measured(val numbers: BenchmarkNumbers, val file: File) : BenchmarkUiState

    /** Nothing could be measured. */
    data class Failed(val reason: String) : BenchmarkUiState
}

/** Runs one benchmark at a time, and goes on while the screen rotates. */
class BenchmarkViewModel(application: Application) : AndroidViewModel(application) {
    private val engine = application.engine
    private val mutable = MutableStateFlow<BenchmarkUiState>(BenchmarkUiState.Idle)
    private val folder: File get() = File(getApplication<Application>().getExternalFilesDir(null), "bench").also { it.mkdirs() }

    val state: StateFlow<BenchmarkUiState> = mutable.asStateFlow()

    /**
     * Measure a model and write the result to a file. Nothing happens while another benchmark is running.
     *
     * @param bundle the folder of the bundle; null takes the model that the chat uses.
     * @param name of the file, which is in the folder `bench` of the app's external files.
     */
    fun run(bundle: File?, settings: BenchmarkSettings, name: String) {
        if (mutable.value is BenchmarkUiState.Running) return
        mutable.value = BenchmarkUiState.Running(done = 0, total = settings.warmup + settings.repeat)
        viewModelScope.launch {
            // a phone has no memory for two models
            mutable.value = engine.withoutModel { withContext(Dispatchers.Default) { measure(bundle, settings, name) } }
        }
    }

    /** Show why nothing was measured. */
    fun refuse(reason: String) {
        mutable.value = BenchmarkUiState.Failed(reason)
    }

    private fun CoroutineScope.measure(bundle: File?, settings: BenchmarkSettings, name: String): BenchmarkUiState {
        val chosen = bundle ?: BundleStore(getApplication()).run { installDemo(); selected() } ?: return BenchmarkUiState.Failed("no model")
        val document = Benchmark(AndroidSystem(getApplication())).run(chosen, settings) { done ->
            ensureActive()
            mutable.value = BenchmarkUiState.Running(done, total = settings.warmup + settings.repeat)
        }
        val file = File(folder, name)
        Benchmark.writeWhole(file, document)
        val result = JSONObject(document).getJSONArray("results").getJSONObject(0)
        val failure = result.getString("failure")
        return if (failure.isEmpty()) BenchmarkUiState.Measured(numbers(result, settings), file) else BenchmarkUiState.Failed(failure)
    }

    private fun numbers(result: JSONObject, settings: BenchmarkSettings) = BenchmarkNumbers(
        prefillTokensPerS = settings.prefill / median(result.getJSONArray("prefill_s")),
        decodeTokensPerS = settings.decode / median(result.getJSONArray("decode_s")),
        ttftMs = 1e3 * median(result.getJSONArray("ttft_s")),
    )

    private fun median(samples: JSONArray): Double = List(samples.length(), samples::getDouble).sorted().let { it[it.size / 2] }
}
