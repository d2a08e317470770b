package gemma.edge.app

import android.content.Intent
import android.os.Bundle
import android.view.WindowManager
import android.widget.TextView
import androidx.activity.viewModels
import androidx.appcompat.app.AppCompatActivity
import androidx.core.view.isVisible
import androidx.lifecycle.Lifecycle
import androidx.lifecycle.ViewModelProvider
import androidx.lifecycle.lifecycleScope
import androidx.lifecycle.repeatOnLifecycle
import gemma.edge.BenchmarkSettings
import gemma.edge.InputException
import gemma.edge.app.databinding.BenchmarkBinding
import java.io.File
import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale
import kotlinx.coroutines.launch

/**
 * The benchmark screen. `adb shell am start` can open it with the extras `bundle`, `backend`, `result` and the numbers of docs/measure/benchmarking.md;
 * then it starts to measure at once.
 */
class BenchmarkActivity : AppCompatActivity() {
    private val benchmark: BenchmarkViewModel by viewModels { ViewModelProvider.AndroidViewModelFactory(application) }
    private lateinit var binding: BenchmarkBinding

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        binding = BenchmarkBinding.inflate(layoutInflater)
        setContentView(binding.root)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON) // the processor slows down when the screen goes off
        binding.toolbar.setNavigationOnClickListener { finish() }
        if (savedInstanceState == null) fill(BenchmarkSettings())
        binding.run.setOnClickListener { refuseOnError { benchmark.run(null, typedSettings(), timedName()) } }
        lifecycleScope.launch { repeatOnLifecycle(Lifecycle.State.STARTED) { benchmark.state.collect(::show) } }
        if (savedInstanceState == null) runRequested(intent)
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        runRequested(intent)
    }

    /** Run the benchmark that an intent requests, if it names a bundle. */
    private fun runRequested(intent: Intent) {
        val bundle = intent.getStringExtra("bundle") ?: return
        refuseOnError {
            val default = BenchmarkSettings()
            val settings = BenchmarkSettings(
                threads = intent.getIntExtra("threads", 0).takeIf { it > 0 },
                prefill = intent.getIntExtra("prefill", default.prefill),
                decode = intent.getIntExtra("decode", default.decode),
                repeat = intent.getIntExtra("repeat", default.repeat),
                warmup = intent.getIntExtra("warmup", default.warmup),
                minutes = intent.getFloatExtra("minutes", 0f).toDouble(),
                backend = intent.getStringExtra("backend"),
            )
            benchmark.run(File(bundle), settings, plainName(intent.getStringExtra("result") ?: timedName()))
        }
    }

    /** The name, if it cannot lead out of the results' folder: any app can send an intent. */
    private fun plainName(name: String): String =
        if (NAME.matches(name)) name else throw InputException("result '$name' is not a plain file name that ends with .json")

    private fun timedName() = SimpleDateFormat("yyyyMMdd-HHmmss", Locale.ROOT).format(Date()) + ".json"

    private fun refuseOnError(act: () -> Unit) = try {
        act()
    } catch (error: InputException) {
        benchmark.refuse(error.message.orEmpty())
    }

    private fun fill(settings: BenchmarkSettings) {
        binding.threads.setText((settings.threads ?: 0).toString())
        binding.prefill.setText(settings.prefill.toString())
        binding.decode.setText(settings.decode.toString())
        binding.repeat.setText(settings.repeat.toString())
    }

    private fun typedSettings() = BenchmarkSettings(
        threads = number(binding.threads).takeIf { it > 0 },
        prefill = number(binding.prefill),
        decode = number(binding.decode),
        repeat = number(binding.repeat),
    )

    private fun number(field: TextView): Int =
        field.text.toString().let { it.toIntOrNull() ?: throw InputException("'$it' is not a whole number") }

    private fun show(state: BenchmarkUiState) {
        val running = state as? BenchmarkUiState.Running
        binding.run.isEnabled = running == null
        binding.progress.isVisible = running != null
        binding.progress.max = maxOf(running?.total ?: 0, 1)
        binding.progress.progress = running?.done ?: 0
        binding.result.text = when (state) {
            is BenchmarkUiState.Idle -> ""
            is BenchmarkUiState.Running -> getString(R.string.running, state.done, state.total)
            is BenchmarkUiState.Measured -> state.numbers.let {
                getString(R.string.bench_result, it.prefillTokensPerS, it.decodeTokensPerS, it.ttftMs, state.file.name)
            }
            is BenchmarkUiState.Failed -> state.reason
        }
    }

    private companion object {
        val NAME = Regex("[\\w-][\\w.-]{0,100}\\.json")
    }
}
