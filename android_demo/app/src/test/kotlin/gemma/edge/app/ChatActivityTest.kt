package gemma.edge.app

import android.content.ClipboardManager
import android.content.ComponentCallbacks2
import android.content.DialogInterface
import android.content.Intent
import android.content.pm.PackageManager
import android.os.PowerManager
import android.view.View
import android.widget.TextView
import androidx.appcompat.app.AlertDialog
import androidx.lifecycle.ViewModelProvider
import androidx.recyclerview.widget.RecyclerView
import com.google.android.material.appbar.MaterialToolbar
import gemma.edge.Device
import gemma.edge.GemmaSession
import gemma.edge.SamplingParams
import gemma.edge.app.bundles.BundleStore
import gemma.edge.app.views.Heat
import gemma.edge.app.views.MessageAdapter
import java.io.File
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.After
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertSame
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.android.controller.ActivityController
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode
import org.robolectric.shadows.ShadowDialog

/** Tests the chat with the demo's bundle, which answers through ONNX Runtime. */
@RunWith(RobolectricTestRunner::class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = [35], qualifiers = "w360dp-h640dp-xhdpi")
class ChatActivityTest {
    private val application = RuntimeEnvironment.getApplication()

    @Before
    fun greedy() = SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 30))

    @After
    fun close() = application.closeModel()

    /** The application on a device with too little memory for any model. */
    class SmallDevice : GemmaApplication() {
        override val engine = Engine { Device(availableBytes = 1 shl 20, bigCores = 2) }
    }

    private fun launch() = Robolectric.buildActivity(ChatActivity::class.java).setup()

    /** A chat in the middle of an answer that ends only when it is stopped. */
    private fun launchIntoALongAnswer(): ActivityController<ChatActivity> {
        SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 1_000_000))
        val chat = launch().loaded()
        chat.get().type(R.id.input, "Tell me everything.")
        chat.get().press(R.id.send)
        waitUntil("an answer begins") { chat.messages().size == 2 && chat.messages()[1].length > 20 }
        return chat
    }

    private fun ActivityController<ChatActivity>.loaded() = also {
        waitUntil("a model is loaded, or it is said why not") { get().findViewById<View>(R.id.send).isEnabled || "/" in get().text(R.id.status) }
        assertTrue(get().text(R.id.status), get().findViewById<View>(R.id.send).isEnabled)
    }

    private fun ActivityController<ChatActivity>.messages(): List<String> =
        (get().findViewById<RecyclerView>(R.id.messages).adapter as MessageAdapter).currentList.map { it.text }

    private fun ActivityController<ChatActivity>.answering() =
        get().findViewById<View>(R.id.send).contentDescription == application.getString(R.string.stop)

    /** Whether no answer is being given, and the list shows all that was said: it takes a new text in the background. */
    private fun ActivityController<ChatActivity>.settled() =
        !answering() && messages() == ViewModelProvider(get())[ChatViewModel::class.java].state.value.messages.map { it.text }

    private fun ActivityController<ChatActivity>.say(text: String) {
        get().type(R.id.input, text)
        get().press(R.id.send)
        waitUntil("the answer is complete") { settled() }
    }

    private fun ActivityController<ChatActivity>.chat() = ViewModelProvider(get())[ChatViewModel::class.java]

    /** What the library answers, and how many tokens it reads for each answer. */
    private fun conversation(vararg turns: String): List<Pair<String, Int>> = runBlocking {
        GemmaSession.open(demoBundle, threads = 1).use { session ->
            turns.map { session.send(it, SamplingParams(), maxTokens = 30).toList().joinToString("") to session.stats!!.promptTokens }
        }
    }

    private fun answers(vararg turns: String): List<String> = conversation(*turns).map { it.first }

    /** The last answer on the screen, and how many tokens were read for it. */
    private fun ActivityController<ChatActivity>.last() = chat().state.value.messages.last().let { it.text to it.stats!!.promptTokens }

    @Test
    fun talks_right_after_installation_as_the_library_does() {
        val chat = launch().loaded()
        assertEquals(application.getString(R.string.empty_chat), chat.get().text(R.id.status))
        chat.say("Who is Ishmael?")
        assertEquals(listOf("Who is Ishmael?") + answers("Who is Ishmael?"), chat.messages())
        val list = chat.get().findViewById<RecyclerView>(R.id.messages)
        waitUntil("the answer's numbers are shown") { "tokens/s" in "${list.getChildAt(1)?.findViewById<TextView>(R.id.stats)?.text}" }
        assertEquals(chat.messages(), (0..1).map { "${list.getChildAt(it).findViewById<TextView>(R.id.text).text}" })
        assertEquals("", chat.get().text(R.id.input))
        chat.get().screenshot("chat")
    }

    @Test
    @Config(qualifiers = "+night")
    fun is_dark_where_the_system_is() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        chat.get().screenshot("chat-dark")
    }

    @Test
    fun large_fonts_leave_everything_on_the_screen() {
        RuntimeEnvironment.setFontScale(2f)
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        val send = chat.get().findViewById<View>(R.id.send)
        val corner = IntArray(2).also(send::getLocationInWindow)
        val window = chat.get().window.decorView
        assertTrue("the button is outside", corner[0] + send.width <= window.width && corner[1] + send.height <= window.height)
        chat.get().screenshot("chat-large-font")
    }

    @Test
    fun stop_ends_an_answer_and_what_was_said_stands() {
        val chat = launchIntoALongAnswer()
        assertTrue(chat.answering())
        chat.get().press(R.id.send)
        waitUntil("it ends") { chat.settled() }
        val said = chat.messages()[1]
        chat.say("Go on.".also { SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 5)) })
        assertEquals(4, chat.messages().size)
        assertEquals(said, chat.messages()[1])
    }

    @Test
    fun rotation_keeps_the_answer_that_is_being_given_and_the_model() {
        val chat = launch().loaded()
        val session = runBlocking { application.engine.open(File(application.filesDir, "bundles/tiny-gemma2")) }
        chat.get().type(R.id.input, "Who is Ishmael?")
        chat.get().press(R.id.send)
        chat.recreate()
        waitUntil("the answer is complete") { chat.settled() && chat.messages().size == 2 }
        assertEquals(answers("Who is Ishmael?").single(), chat.messages()[1])
        assertSame(session, runBlocking { application.engine.open(File(application.filesDir, "bundles/tiny-gemma2")) })
    }

    @Test
    fun the_conversation_survives_the_end_of_the_process_and_is_not_read_again() {
        val first = launch().loaded()
        first.say("Who is Ishmael?")
        val meter = first.chat().state.value.meter!!
        first.pause().stop().destroy()
        application.closeModel()
        val second = launch().loaded()
        val expected = conversation("Who is Ishmael?", "And the whale?")
        assertEquals(listOf("Who is Ishmael?", expected[0].first), second.messages())
        assertEquals(meter, second.chat().state.value.meter)
        assertEquals("Context: ${meter.tokens} of 512 tokens", second.get().text(R.id.meter))
        second.say("And the whale?")
        assertEquals(expected[1], second.last())
    }

    @Test
    fun a_state_that_was_lost_or_damaged_has_the_conversation_read_again() {
        val expected = answers("Who is Ishmael?", "And the whale?")
        launch().loaded().also { it.say("Who is Ishmael?") }.pause().stop().destroy()
        application.closeModel()
        val folder = File(application.filesDir, "conversations")
        folder.listFiles()!!.single { it.name.endsWith(".state") }.let { it.writeBytes(it.readBytes().copyOf(1000)) }
        val chat = launch().loaded()
        chat.say("And the whale?")
        assertEquals(expected[1], chat.messages()[3])
    }

    @Test
    fun short_memory_lets_the_model_go_and_the_next_message_brings_it_back() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        application.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_UI_HIDDEN)
        assertTrue(chat.chat().state.value.meter != null)
        application.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_BACKGROUND)
        waitUntil("the model is gone") { chat.chat().state.value.meter == null }
        chat.say("And the whale?")
        assertEquals("nothing is read again", conversation("Who is Ishmael?", "And the whale?")[1], chat.last())
        application.onTrimMemory(ComponentCallbacks2.TRIM_MEMORY_COMPLETE)
        waitUntil("the model is gone") { chat.chat().state.value.meter == null }
        chat.pause().stop()
        chat.start().resume()
        waitUntil("the model is back") { chat.chat().state.value.meter != null }
    }

    @Test
    fun answer_again_takes_the_last_answer_back() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        chat.say("And the whale?")
        SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 5))
        chat.chat().regenerate()
        waitUntil("the answer is complete") { chat.settled() && chat.chat().state.value.messages.last().stats?.newTokens == 5 }
        val expected = answers("Who is Ishmael?", "And the whale?")
        assertEquals(listOf("Who is Ishmael?", expected[0], "And the whale?"), chat.messages().dropLast(1))
        assertTrue(expected[1].startsWith(chat.messages().last()))
    }

    @Test
    fun conversations_are_listed_opened_renamed_exported_and_deleted_after_a_question() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        val first = chat.messages()
        chat.get().findViewById<MaterialToolbar>(R.id.toolbar).menu.performIdentifierAction(R.id.new_chat, 0)
        waitUntil("it is empty") { chat.messages().isEmpty() }
        chat.say("And the whale?")
        val screen = Robolectric.buildActivity(ConversationsActivity::class.java).setup().get()
        fun rows() = screen.conversations.state.value.rows.orEmpty()
        waitUntil("they are listed") { rows().map { it.title } == listOf("And the whale?", "Who is Ishmael?") }
        screen.screenshot("conversations")
        screen.conversations.rename(rows()[1].id, "The sailor")
        waitUntil("it is renamed") { rows().map { it.title } == listOf("And the whale?", "The sailor") }
        val text = rows()[1].toMarkdown("You")
        assertEquals("# The sailor\n\n**You:**\n\nWho is Ishmael?\n\n**tiny-gemma2:**\n\n${first[1].trim()}\n", text)
        chat.chat().open(rows()[1].id)
        waitUntil("it is on the screen") { chat.messages() == first }
        chat.say("And the whale?")
        assertEquals(answers("Who is Ishmael?", "And the whale?")[1], chat.messages()[3])
        val other = rows().first { it.title == "And the whale?" }
        screen.actOn(other, R.id.remove)
        assertEquals(2, rows().size)
        (ShadowDialog.getLatestDialog() as AlertDialog).getButton(DialogInterface.BUTTON_POSITIVE).performClick()
        waitUntil("it is deleted") { rows().map { it.title } == listOf("The sailor") }
        assertEquals(2, File(application.filesDir, "conversations").list()!!.size)
    }

    @Test
    fun the_engine_is_chosen_among_those_of_the_model_and_the_app() {
        val chat = launch().loaded()
        assertEquals(EngineChoice(listOf("onnx"), null), chat.chat().state.value.engines)
        chat.chat().chooseEngine("onnx")
        waitUntil("it is chosen") { chat.chat().state.value.engines.chosen == "onnx" && chat.settled() }
        assertEquals("onnx", BundleStore(application).backend(BundleStore(application).selected()!!))
        BundleStore(application).chooseBackend(BundleStore(application).selected()!!, "executorch")
        assertEquals("an engine that this app has not", null, BundleStore(application).backend(BundleStore(application).selected()!!))
    }

    @Test
    fun a_warm_phone_is_named() {
        assertEquals(listOf(null, null, R.string.warm, R.string.warm, R.string.too_hot), (0..4).map(Heat::warningFor))
        val chat = launch().loaded()
        val warning = chat.get().findViewById<TextView>(R.id.heat)
        assertEquals(View.GONE, warning.visibility)
        val power = shadowOf(application.getSystemService(PowerManager::class.java))
        power.setCurrentThermalStatus(PowerManager.THERMAL_STATUS_SEVERE)
        assertEquals(View.VISIBLE to application.getString(R.string.warm), warning.visibility to "${warning.text}")
        power.setCurrentThermalStatus(PowerManager.THERMAL_STATUS_NONE)
        assertEquals(View.GONE, warning.visibility)
    }

    @Test
    fun a_message_is_copied_and_shared() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        val answer = chat.chat().state.value.messages[1]
        chat.get().actOn(answer, R.id.copy)
        assertEquals(answer.text, "${application.getSystemService(ClipboardManager::class.java).primaryClip!!.getItemAt(0).text}")
        chat.get().actOn(answer, R.id.share)
        @Suppress("DEPRECATION")
        val shared = shadowOf(chat.get()).nextStartedActivity.getParcelableExtra<Intent>(Intent.EXTRA_INTENT)!!
        assertEquals(answer.text, shared.getStringExtra(Intent.EXTRA_TEXT))
    }

    @Test
    fun a_benchmark_takes_the_model_from_an_answer_and_the_chat_goes_on_after_it() {
        val chat = launchIntoALongAnswer()
        val screen = Robolectric.buildActivity(BenchmarkActivity::class.java).setup().get()
        for (field in listOf(R.id.prefill, R.id.decode, R.id.repeat)) screen.type(field, "3")
        screen.press(R.id.run)
        waitUntil("it is measured") { "medians" in screen.text(R.id.result) }
        waitUntil("the answer has ended") { chat.settled() }
        val said = chat.messages()[1]
        assertEquals(null, chat.chat().state.value.meter)
        SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 5))
        chat.say("Go on.")
        assertEquals(listOf("Tell me everything.", said, "Go on."), chat.messages().take(3))
        assertTrue(chat.messages()[3].isNotEmpty())
    }

    @Test
    @Config(qualifiers = "+de")
    fun the_screen_speaks_the_language_of_the_phone() {
        val chat = launch().loaded()
        assertEquals("Senden", chat.get().findViewById<View>(R.id.send).contentDescription)
        assertTrue(chat.get().text(R.id.status).startsWith("Sag etwas"))
    }

    @Test
    fun a_new_chat_is_empty() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        chat.get().findViewById<MaterialToolbar>(R.id.toolbar).menu.performIdentifierAction(R.id.new_chat, 0)
        waitUntil("it is empty") { chat.messages().isEmpty() }
        chat.say("Who is Ishmael?")
        assertEquals(answers("Who is Ishmael?").single(), chat.messages()[1])
    }

    @Test
    fun the_system_prompt_goes_before_the_first_message() {
        SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 30, systemPrompt = "Speak like Ahab."))
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        assertEquals(listOf("Who is Ishmael?") + answers("Speak like Ahab.\n\nWho is Ishmael?"), chat.messages())
    }

    @Test
    @Config(application = SmallDevice::class)
    fun too_little_memory_is_said_before_anything_is_loaded() {
        val chat = launch()
        waitUntil("it is said") { "1 MiB free" in chat.get().text(R.id.status) }
        assertFalse(chat.get().findViewById<View>(R.id.send).isEnabled)
        chat.get().screenshot("not-enough-memory")
    }

    @Test
    fun a_damaged_model_is_named_and_does_not_crash() {
        BundleStore(application).installDemo()
        File(application.filesDir, "bundles/tiny-gemma2/generate.onnx").let { it.writeBytes(ByteArray(it.length().toInt())) }
        val chat = launch()
        waitUntil("it is said") { "generate.onnx is damaged" in chat.get().text(R.id.status) }
    }

    @Test
    fun without_a_model_it_says_where_to_get_one() {
        BundleStore(application).run { installDemo(); delete(selected()!!) }
        val chat = launch()
        waitUntil("it is said") { chat.get().text(R.id.status) == application.getString(R.string.no_model) }
    }

    @Test
    fun asks_for_what_imports_need_alone_and_everything_has_a_name_for_talkback() {
        val info = application.packageManager.getPackageInfo(application.packageName, PackageManager.GET_PERMISSIONS)
        val asked = info.requestedPermissions.orEmpty().filter { it.startsWith("android.permission") }
        val forImports = listOf("FOREGROUND_SERVICE", "FOREGROUND_SERVICE_DATA_SYNC", "POST_NOTIFICATIONS", "WAKE_LOCK")
        assertEquals((listOf("INTERNET") + forImports).map { "android.permission.$it" }, asked)
        val chat = launch().loaded()
        assertEquals(application.getString(R.string.send), chat.get().findViewById<View>(R.id.send).contentDescription)
        chat.say("Who is Ishmael?")
        val list = chat.get().findViewById<RecyclerView>(R.id.messages)
        val spoken = (0..1).map { list.getChildAt(it).findViewById<View>(R.id.text).contentDescription.toString() }
        assertTrue("$spoken", spoken[0].startsWith("You said") && spoken[1].startsWith("tiny-gemma2 said"))
    }
}
