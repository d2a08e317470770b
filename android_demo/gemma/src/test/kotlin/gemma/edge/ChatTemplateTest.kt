package gemma.edge

import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

class ChatTemplateTest {
    @get:Rule
    val temporary = TemporaryFolder()

    @Test
    fun renders_as_the_checkpoints_own_template_does_in_python() {
        for (model in Fixtures.models) {
            val template = ChatTemplate.of(Bundle.open(model.bundle))
            for (chat in model.chats) {
                val messages = chat["messages"].list.map { Message(it["role"].string, it["content"].string) }
                assertEquals(model.name, chat["text"].string, template.render(messages))
            }
        }
    }

    @Test
    fun an_answer_ends_where_it_does_in_python() {
        for (model in Fixtures.models) assertEquals(model.name, model.stopIds, Tokenizer.open(Bundle.open(model.bundle)).stopIds)
        val gemma3 = Fixtures.models.single { it.name == "random-gemma3" }
        assertEquals(setOf(1, 106), gemma3.stopIds)
        assertTrue("no conversation has a system turn", gemma3.chats.any { it["messages"].list[0]["role"].string == "system" })
    }

    @Test
    fun a_system_message_and_two_turns_of_one_are_refused() {
        val user = Message("user", "Hi")
        assertRefuses<InputException>("system") { ChatTemplate.GEMMA2.render(listOf(Message("system", "Be kind."), user)) }
        assertRefuses<InputException>("message 1", "take turns") { ChatTemplate.GEMMA2.render(listOf(user, user)) }
    }

    @Test
    fun gemma3_begins_the_users_first_turn_with_what_the_system_says() {
        val turns = listOf(Message("user", " Hi "), Message("assistant", "Hello.\n"), Message("user", "Why?"))
        assertEquals(ChatTemplate.GEMMA2.render(turns), ChatTemplate.GEMMA3.render(turns))
        assertEquals(
            "<bos><start_of_turn>user\nBe kind. \n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n" +
                "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
            ChatTemplate.GEMMA3.render(listOf(Message("system", "Be kind. ")) + turns),
        )
        assertRefuses<InputException>("message 1", "take turns") { ChatTemplate.GEMMA3.render(listOf(turns[0], Message("system", "No."))) }
    }

    @Test
    fun a_template_of_another_format_is_refused_and_none_is_gemmas() {
        val folder = Fixtures.copyOfDemo(temporary.root)
        val config = File(folder, "tokenizer_config.json")
        val text = config.readText()
        write(folder, config, text.replace("<start_of_turn>' + role", "<|im_start|>' + role"))
        assertRefuses<UnsupportedException>("chat template", "ChatTemplate") { ChatTemplate.of(Bundle.open(folder)) }
        write(folder, config, "{}")
        assertEquals(ChatTemplate.GEMMA2, ChatTemplate.of(Bundle.open(folder)))
        write(folder, config, "{")
        assertRefuses<BundleException>("tokenizer_config.json") { ChatTemplate.of(Bundle.open(folder)) }
    }

    /** Replace the text of a file, and its size in the manifest. */
    private fun write(folder: File, file: File, text: String) {
        val manifest = File(folder, Bundle.MANIFEST)
        val size = Regex("(\"${file.name}\": \\{\\s*\"bytes\": )\\d+")
        file.writeText(text)
        manifest.writeText(manifest.readText().replace(size, "$1${file.length()}"))
    }
}
