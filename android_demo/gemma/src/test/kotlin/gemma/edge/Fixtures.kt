package gemma.edge

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue

/** The answers of Python that `make android-test` wrote. */
internal object Fixtures {
    private val root = File(System.getProperty("gemma.fixtures"))

    val demoBundle = File(System.getProperty("gemma.demo.bundle"))

    val tokenizers: List<File> get() = folders("tokenizers")

    val models: List<Model> get() = folders("models").map(::Model)

    /** A bundle with each of its adapters. */
    val adapters: List<Model> get() = folders("adapters").map(::Model)

    /** Answers of sessions that share a runtime, by turn: one with each adapter, the last without one. */
    val interleaved: List<List<String>> get() = json(File(root, "interleaved.json")).list.map { row -> row.list.map { it.string } }

    /** An adapter, of no bundle in particular. */
    val anAdapter: File get() = File(System.getProperty("gemma.adapters"), "int8")

    private fun folders(name: String): List<File> {
        val folders = File(root, name).listFiles().orEmpty().sorted()
        check(folders.isNotEmpty()) { "${File(root, name)} is empty or missing: run make android-test" }
        return folders
    }

    /** One bundle, and what the Python runtime computed from it. */
    class Model(private val folder: File) {
        private val answers = json(File(folder, "answers.json"))
        val name: String get() = folder.name
        val bundle = File(answers["bundle"].string)
        val adapter: File? = if (answers["adapter"].value == null) null else File(answers["adapter"].string)
        val tokens = ints(answers["tokens"])
        val calls = ints(answers["calls"])

        /** How many tokens at the beginning are pinned while the calls are made. */
        val pinned = answers["pinned"].int(0..Int.MAX_VALUE)
        val greedy = answers["greedy"].list
        val conversation = answers["conversation"].list

        /** A conversation that begins with a text that is not the user's. */
        val prefixed = answers["prefixed"].list
        val chats = answers["chats"].list
        val filters = answers["filters"].list

        /** The tokens that end an answer. */
        val stopIds = ints(answers["stop_ids"]).toSet()

        /** How many calls come before the state that Python saved. */
        val stateCalls = answers["state_calls"].int(1..calls.size)
        val state = File(folder, "state.safetensors")
        val savedConversation = File(folder, "conversation.safetensors")
        val savedPrefixed = File(folder, "prefixed.safetensors")

        /** The folder in which Python looks for the states that Kotlin saved. */
        val fromKotlin = File(root, "from-kotlin/$name").also { it.mkdirs() }

        /** The logits after every call, joined. */
        fun logits(): FloatArray = floats("runtime.f32")

        /** The logits after every call from number [call] on, joined. */
        fun logitsAfter(call: Int): FloatArray = logits().let { it.copyOfRange(it.size / calls.size * call, it.size) }

        /** The logits after every call that follows the state, joined. */
        fun logitsAfterState(): FloatArray = floats("state.f32")

        /** The logits after the first calls that follow, joined, if the state's tokens are fed again. */
        fun logitsFedAgain(): FloatArray = floats("refed.f32")

        private fun floats(file: String): FloatArray {
            val buffer = ByteBuffer.wrap(File(folder, file).readBytes()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
            return FloatArray(buffer.remaining()).also { buffer.get(it) }
        }
    }

    fun json(file: File) = Node(JsonReader.parse(file.readBytes()), file.name)

    fun ints(node: Node): IntArray = node.list.map { it.int(0..Int.MAX_VALUE) }.toIntArray()

    /** A copy of the demo's bundle, which a test may damage. */
    fun copyOfDemo(folder: File): File = File(folder, "bundle").also { demoBundle.copyRecursively(it) }
}

/** Assert that [act] throws a `T` whose message is one line with all [parts] in it. */
internal inline fun <reified T : Throwable> assertRefuses(vararg parts: String, noinline act: () -> Unit) {
    val message = assertThrows(T::class.java, act).message.orEmpty()
    for (part in parts) assertTrue("'$part' is not in: $message", part in message)
    assertTrue("more than one line: $message", '\n' !in message)
}

/** A number in a JSON file, with or without a decimal point. */
internal val Node.double: Double get() = (value as Number).toDouble()

/** Feed a model's tokens call by call, as Python did, and return the logits after each of [calls], joined. */
internal fun GemmaRuntime.run(model: Fixtures.Model, calls: IntRange = model.calls.indices): FloatArray {
    if (position == 0) pin(model.pinned)
    val all = FloatArray(calls.count() * bundle.vocabSize)
    var start = model.calls.take(calls.first).sum()
    model.calls.slice(calls).forEachIndexed { row, length ->
        val logits = if (length == 1) decode(model.tokens[start]) else prefill(model.tokens.copyOfRange(start, start + length))
        logits.copyInto(all, row * bundle.vocabSize)
        start += length
    }
    return all
}
