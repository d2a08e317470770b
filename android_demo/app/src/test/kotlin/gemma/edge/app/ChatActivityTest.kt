package gemma.edge.app

import android.content.pm.PackageManager
import android.os.Bundle
import android.view.View
import android.widget.TextView
import androidx.lifecycle.ViewModelProvider
import androidx.recyclerview.widget.RecyclerView
import gemma.edge.Device
import gemma.edge.GemmaSession
import gemma.edge.SamplingParams
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
import org.robolectric.android.controller.ActivityController
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode

/** Tests the chat with the demo's bundle, which answers through ONNX Runtime. */
@RunWith(RobolectricTestRunner::class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = [35], qualifiers = "w360dp-h640dp-xhdpi")
class ChatActivityTest {
    private val application = RuntimeEnvironment.getApplication()

    @Before
    fun greedy() = SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 30))

    @After
    fun close() = runBlocking { application.engine.close() }

    /** The application on a device with too little memory for any model. */
    class SmallDevice : GemmaApplication() {
        override val engine = Engine { Device(availableBytes = 1 shl 20, bigCores = 2) }
    }

    private fun launch() = Robolectric.buildActivity(ChatActivity::class.java).setup()

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

    private fun answers(vararg turns: String): List<String> = runBlocking {
        GemmaSession.open(demoBundle, threads = 1).use { session ->
            turns.map { session.send(it, SamplingParams(), maxTokens = 30).toList().joinToString("") }
        }
    }

    @Test
    fun talks_right_after_installation_as_the_library_does() {
        val chat = launch().loaded()
        assertEquals(application.getString(R.string.empty_chat), chat.get().text(R.id.status))
        chat.say("Who is Ishmael?")
        assertEquals(listOf("Who is Ishmael?") + answers("Who is Ishmael?"), chat.messages())
        val bubbles = chat.get().findViewById<RecyclerView>(R.id.messages).let { list -> (0..1).map(list::getChildAt) }
        assertEquals(chat.messages(), bubbles.map { "${it.findViewById<TextView>(R.id.text).text}" })
        val stats = bubbles[1].findViewById<TextView>(R.id.stats)
        assertTrue("${stats.text}", "tokens/s" in stats.text)
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
        SettingsStore(application).save(Settings(temperature = 0.0, maxTokens = 1_000_000))
        val chat = launch().loaded()
        chat.get().type(R.id.input, "Tell me everything.")
        chat.get().press(R.id.send)
        waitUntil("an answer begins") { chat.messages().size == 2 && chat.messages()[1].length > 20 }
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
    fun the_conversation_survives_the_end_of_the_process() {
        val first = launch().loaded()
        first.say("Who is Ishmael?")
        val saved = Bundle()
        first.saveInstanceState(saved).pause().stop().destroy()
        runBlocking { application.engine.close() }
        val second = Robolectric.buildActivity(ChatActivity::class.java).setup(saved).loaded()
        val expected = answers("Who is Ishmael?", "And the whale?")
        assertEquals(listOf("Who is Ishmael?", expected[0]), second.messages())
        second.say("And the whale?")
        assertEquals(expected[1], second.messages()[3])
    }

    @Test
    fun a_new_chat_is_empty() {
        val chat = launch().loaded()
        chat.say("Who is Ishmael?")
        chat.get().findViewById<com.google.android.material.appbar.MaterialToolbar>(R.id.toolbar).menu.performIdentifierAction(R.id.new_chat, 0)
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
    fun asks_for_no_permission_and_everything_has_a_name_for_talkback() {
        val info = application.packageManager.getPackageInfo(application.packageName, PackageManager.GET_PERMISSIONS)
        val asked = info.requestedPermissions.orEmpty().filter { it.startsWith("android.permission") }
        assertEquals(emptyList<String>(), asked)
        val chat = launch().loaded()
        assertEquals(application.getString(R.string.send), chat.get().findViewById<View>(R.id.send).contentDescription)
        chat.say("Who is Ishmael?")
        val list = chat.get().findViewById<RecyclerView>(R.id.messages)
        val spoken = (0..1).map { list.getChildAt(it).findViewById<View>(R.id.text).contentDescription.toString() }
        assertTrue("$spoken", spoken[0].startsWith("You said") && spoken[1].startsWith("tiny-gemma2 said"))
    }
}
