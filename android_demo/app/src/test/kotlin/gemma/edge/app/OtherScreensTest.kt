package gemma.edge.app

import android.content.DialogInterface
import android.content.Intent
import android.view.View
import androidx.appcompat.app.AlertDialog
import androidx.recyclerview.widget.RecyclerView
import com.google.android.material.button.MaterialButton
import gemma.edge.app.bundles.BundleStore
import gemma.edge.app.bundles.ImportState
import gemma.edge.app.bundles.ImportStep
import gemma.edge.app.bundles.Source
import gemma.edge.app.bundles.SourceFile
import gemma.edge.app.bundles.behind
import java.io.File
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.launch
import org.json.JSONObject
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode
import org.robolectric.shadows.ShadowDialog

@RunWith(RobolectricTestRunner::class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = [35], qualifiers = "w360dp-h640dp-xhdpi")
class OtherScreensTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val application = RuntimeEnvironment.getApplication()

    @After
    fun close() = application.closeModel()

    /** A folder of this machine instead of one that the file picker returned. */
    private class FolderSource(private val folder: File, override val name: String = folder.name) : Source {
        override fun files() = folder.walk().filter { it.isFile }.map { file ->
            SourceFile(file.relativeTo(folder).path, file.length()) { from -> file.inputStream().behind(from) }
        }.toList()
    }

    private fun import(source: Source) {
        MainScope().launch { (application as GemmaApplication).imports.run { source } }
    }

    @Test
    fun settings_are_kept_and_wrong_numbers_are_refused() {
        val screen = Robolectric.buildActivity(SettingsActivity::class.java).setup().get()
        assertEquals("0.7", screen.text(R.id.temperature))
        screen.screenshot("settings")
        screen.type(R.id.top_p, "1.5")
        screen.press(R.id.save)
        assertTrue(screen.text(R.id.error), "topP 1.5" in screen.text(R.id.error))
        screen.type(R.id.top_p, "0.5")
        screen.type(R.id.max_tokens, "0")
        screen.press(R.id.save)
        assertTrue("'0'" in screen.text(R.id.error))
        assertFalse(screen.isFinishing)
        screen.type(R.id.max_tokens, "7")
        screen.type(R.id.system_prompt, " Be brief. ")
        screen.press(R.id.save)
        assertTrue(screen.isFinishing)
        assertEquals(Settings(topP = 0.5, maxTokens = 7, systemPrompt = "Be brief."), SettingsStore(application).load())
    }

    @Test
    fun a_model_is_imported_with_its_hashes_checked_chosen_and_deleted() {
        BundleStore(application).installDemo()
        val screen = Robolectric.buildActivity(ModelsActivity::class.java).setup().get()
        import(FolderSource(demoBundle, "other"))
        waitUntil("it is imported") { screen.models.state.value.run { import !is ImportState.Importing && rows.size == 2 } }
        assertEquals("other", BundleStore(application).selected()?.name)
        assertEquals("", screen.text(R.id.status))
        screen.screenshot("models")
        val list = screen.findViewById<RecyclerView>(R.id.list)
        list.getChildAt(1).findViewById<MaterialButton>(R.id.use).performClick()
        waitUntil("it is chosen") { BundleStore(application).selected()?.name == "tiny-gemma2" }
        waitUntil("it is shown") { list.getChildAt(1).findViewById<View>(R.id.use).isEnabled.not() }
        list.getChildAt(0).findViewById<MaterialButton>(R.id.delete).performClick()
        assertEquals("it asks first", 2, screen.models.state.value.rows.size)
        (ShadowDialog.getLatestDialog() as AlertDialog).getButton(DialogInterface.BUTTON_POSITIVE).performClick()
        waitUntil("it is deleted") { screen.models.state.value.rows.map { it.folder.name } == listOf("tiny-gemma2") }
    }

    @Test
    fun an_import_tells_how_far_it_is() {
        val steps = ArrayList<ImportStep>()
        BundleStore(application).import(FolderSource(demoBundle), steps::add)
        assertEquals(listOf(ImportStep.Copying(100), ImportStep.Checking(100)), steps.filter { it.percent == 100 }.distinct())
        assertEquals(steps.filterIsInstance<ImportStep.Copying>() + steps.filterIsInstance<ImportStep.Checking>(), steps)
        for (kind in steps.groupBy { it::class }.values) assertEquals(kind.map { it.percent }.sorted(), kind.map { it.percent })
    }

    @Test
    fun an_import_that_fails_says_why_and_leaves_nothing() {
        val damaged = temporary.newFolder("damaged")
        demoBundle.copyRecursively(damaged)
        File(damaged, "model.onnx.data").let { it.writeBytes(it.readBytes().also { bytes -> bytes[0] = (bytes[0] + 1).toByte() }) }
        val screen = Robolectric.buildActivity(ModelsActivity::class.java).setup().get()
        fun import(source: Source, reason: String) {
            import(source)
            waitUntil("it says $reason") { reason in screen.text(R.id.status) }
            assertEquals(emptyList<String>(), File(application.filesDir, "bundles").list().orEmpty().toList())
        }
        import(FolderSource(damaged), "model.onnx.data was changed")
        import(FolderSource(temporary.newFolder("photos")), "not a bundle")
        val evil = object : Source {
            override val name = "evil"
            override fun files() = listOf("manifest.json", "../../escaped").map { SourceFile(it, 2) { "{}".byteInputStream() } }
        }
        import(evil, "outside the bundle")
        assertFalse(File(application.filesDir, "escaped").exists())
    }

    @Test
    fun the_benchmark_screen_measures_the_chosen_model() {
        val screen = Robolectric.buildActivity(BenchmarkActivity::class.java).setup().get()
        screen.type(R.id.prefill, "20")
        screen.type(R.id.decode, "5")
        screen.type(R.id.repeat, "x")
        screen.press(R.id.run)
        waitUntil("it is refused") { "'x'" in screen.text(R.id.result) }
        screen.type(R.id.repeat, "2")
        screen.press(R.id.run)
        waitUntil("it is done") { "medians" in screen.text(R.id.result) }
        screen.screenshot("benchmark")
    }

    private fun started(name: String, vararg extras: Pair<String, Any>): BenchmarkActivity {
        val intent = Intent(application, BenchmarkActivity::class.java).putExtra("result", name)
        for ((key, value) in extras) if (value is Int) intent.putExtra(key, value) else intent.putExtra(key, value.toString())
        return Robolectric.buildActivity(BenchmarkActivity::class.java, intent).setup().get()
    }

    private fun result(name: String): JSONObject {
        val file = File(application.getExternalFilesDir(null), "bench/$name")
        waitUntil("$file is written") { file.exists() }
        return JSONObject(file.readText()).getJSONArray("results").getJSONObject(0)
    }

    @Test
    fun an_intent_measures_at_once_and_writes_every_token() {
        val battery = Intent(Intent.ACTION_BATTERY_CHANGED)
        application.sendStickyBroadcast(battery.putExtra("level", 40).putExtra("scale", 50).putExtra("temperature", 315).putExtra("plugged", 1))
        started("a.json", "bundle" to demoBundle.path, "threads" to 1, "prefill" to 16, "decode" to 6, "repeat" to 2, "warmup" to 1)
        val found = result("a.json")
        assertEquals("", found.getString("failure"))
        assertEquals(2, found.getJSONArray("decode_ms").length())
        assertEquals(6, found.getJSONArray("decode_ms").getJSONArray(1).length())
        assertEquals(1, found.getJSONObject("settings").getInt("threads"))
        val state = found.getJSONObject("state").getJSONObject("before")
        assertEquals(80.0, state.getDouble("battery_percent"), 0.0)
        assertEquals(31.5, state.getDouble("battery_temperature_c"), 0.0)
        assertTrue(state.getBoolean("plugged") && state.has("thermal_status"))
        assertTrue(found.getJSONObject("memory").has("pss_mib"))
        assertTrue(found.getJSONObject("device").getString("system").startsWith("Android"))
    }

    @Test
    fun an_intent_chooses_the_backend() {
        started("d.json", "bundle" to demoBundle.path, "backend" to "tflite")
        val found = result("d.json")
        assertTrue(found.getString("failure"), "no 'tflite' backend, only onnx" in found.getString("failure"))
        assertEquals("tflite", found.getJSONObject("model").getString("backend"))
    }

    @Test
    fun an_intent_for_no_bundle_is_answered_and_one_that_leaves_the_folder_is_not() {
        started("b.json", "bundle" to "/nowhere")
        assertTrue("not a bundle" in result("b.json").getString("failure"))
        val screen = started("../c.json", "bundle" to demoBundle.path)
        waitUntil("it is refused") { "../c.json" in screen.text(R.id.result) }
        assertFalse(File(application.getExternalFilesDir(null), "c.json").exists())
    }
}
