package gemma.edge

import gemma.edge.state.Safetensors
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlinx.coroutines.async
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder

/** Tests adapters, which tools/kotlin_fixtures/random_adapters.py made, against Python's answers with each of them. */
class AdapterTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val all = Fixtures.adapters
    private val bundle = Bundle.open(all.first().bundle)
    private val alone = Fixtures.models.first { it.name == bundle.folder.name }

    private fun open(): GemmaRuntime = GemmaRuntime.open(bundle, threads = 1)

    private fun session(runtime: GemmaRuntime, adapter: Adapter?) =
        GemmaSession(runtime, Tokenizer.open(bundle), ChatTemplate.of(bundle), adapter = adapter)

    private suspend fun GemmaSession.say(text: String) = send(text, maxTokens = 20).toList().joinToString("")

    @Test
    fun logits_are_pythons_bit_for_bit_whichever_adapter_was_used_before() = open().use { runtime ->
        assertEquals("all ways to store factors", listOf("float16", "float32", "int8"), all.map { it.name })
        val opened = all.associateWith { Adapter.open(it.adapter!!) }
        for (model in listOf(all[0], all[1], alone, all[2], all[0], alone)) {
            runtime.useAdapter(opened[model])
            assertEquals(opened[model], runtime.adapter)
            assertEquals("a switch begins anew", 0, runtime.position)
            check(model.tokens.size > runtime.backend.cache.context)
            assertArrayEquals(model.name, model.logits(), runtime.run(model), 0f)
            runtime.useAdapter(model.adapter?.let(Adapter::open))
            assertEquals("the same one changes nothing", model.tokens.size, runtime.position)
        }
        val last = (all + alone).map { model -> model.logits().let { it.copyOfRange(it.size - bundle.vocabSize, it.size).asList() } }
        assertEquals("each adapter does something", 4, last.toSet().size)
    }

    @Test
    fun states_are_pythons_and_belong_to_their_adapter() = open().use { runtime ->
        for (model in all) {
            runtime.useAdapter(Adapter.open(model.adapter!!))
            runtime.prefill(intArrayOf(2, 9, 9)) // these tokens must be forgotten
            runtime.load(model.state)
            val rest = model.stateCalls until model.calls.size
            assertArrayEquals(model.name, model.logitsAfterState(), runtime.run(model, rest), 0f)
            runtime.reset()
            runtime.run(model, 0..model.stateCalls)
            runtime.rewind(1)
            // check_states.py lets Python go on from it, and refuse it with the other adapters
            val saved = File(model.fromKotlin, "state.safetensors")
            runtime.save(saved, "{\"kept\": \"by Kotlin\"}")
            for (other in all - model + alone) {
                assertRefuses<StateException>("another bundle, backend or adapter") { runtime.load(other.state) }
            }
            runtime.useAdapter(null)
            assertRefuses<StateException>("another bundle, backend or adapter") { runtime.load(saved) }
            runtime.load(alone.state)
            assertArrayEquals(alone.logitsAfterState(), runtime.run(alone, alone.stateCalls until alone.calls.size), 0f)
        }
    }

    @Test
    fun sessions_with_different_adapters_share_a_runtime_and_take_turns_as_pythons() = open().use { runtime ->
        val sessions = (all + alone).map { model ->
            runtime.useAdapter(null)
            session(runtime, model.adapter?.let(Adapter::open))
        }
        for ((row, turn) in alone.conversation.zip(Fixtures.interleaved)) {
            val answers = sessions.map { runBlocking { it.say(row["text"].string) } }
            assertEquals(turn, answers)
            assertEquals("each adapter does something", 4, answers.toSet().size)
        }
    }

    @Test
    fun sessions_of_one_adapter_share_a_runtime_too() = open().use { runtime ->
        val sessions = List(2) { session(runtime, null) }
        for (row in alone.conversation.take(1)) {
            for (session in sessions) assertEquals(row["answer"].string, runBlocking { session.say(row["text"].string) })
        }
        val (first, second) = sessions
        val saved = File(temporary.root, "first")
        runBlocking { first.save(saved) }
        val next = runBlocking { first.say("Why?") }
        assertEquals(next, runBlocking { second.say("Why?") })
        runBlocking { second.load(saved) }
        assertEquals(first.messages.take(2), second.messages)
        assertEquals(next, runBlocking { second.say("Why?") })
    }

    @Test
    fun answers_of_two_sessions_at_the_same_time_wait_for_each_other() = open().use { runtime ->
        val models = all.take(2)
        val sessions = models.map { session(runtime, Adapter.open(it.adapter!!)) }
        val answers = runBlocking { sessions.map { async { it.say(alone.conversation.first()["text"].string) } }.map { it.await() } }
        assertEquals(models.map { it.conversation.first()["answer"].string }, answers)
    }

    @Test
    fun a_saved_conversation_goes_on_with_its_adapter() {
        for (model in all) {
            val file = File(model.fromKotlin, "conversation.safetensors")
            val last = model.conversation.last()
            open().use { runtime ->
                val session = session(runtime, Adapter.open(model.adapter!!))
                runBlocking {
                    for (row in model.conversation.dropLast(1)) session.say(row["text"].string)
                    session.save(file)
                }
            }
            for (saved in listOf(file, model.savedConversation)) runBlocking {
                GemmaSession.open(bundle.folder, threads = 1, adapter = model.adapter).use { session ->
                    session.load(saved)
                    assertEquals(last["answer"].string, session.say(last["text"].string))
                    assertEquals("only what is new was fed", last["position"].long, session.position.toLong())
                }
                GemmaSession.open(bundle.folder, threads = 1).use { session ->
                    assertRefuses<StateException>("another bundle, backend or adapter") { runBlocking { session.load(saved) } }
                }
            }
        }
    }

    @Test
    fun an_adapter_of_another_bundle_is_refused_and_changes_nothing() {
        val adapter = Adapter.open(all.first().adapter!!)
        GemmaRuntime.open(Bundle.open(Fixtures.demoBundle), threads = 1).use { runtime ->
            runtime.prefill(intArrayOf(2, 3))
            assertRefuses<AdapterException>("was made for another bundle than ${Fixtures.demoBundle}") { runtime.useAdapter(adapter) }
            assertNull(runtime.adapter)
            assertEquals(2, runtime.position)
        }
        assertRefuses<NotEnoughMemoryException>("0 MiB free", "smaller rank") { Device(adapter.bytes - 1, 1).requireMemoryFor(adapter) }
        Device(adapter.bytes, 1).requireMemoryFor(adapter)
        assertRefuses<AdapterException>("no adapter.json") { runBlocking { GemmaSession.open(bundle.folder, adapter = bundle.folder) } }
    }

    @Test
    fun a_damaged_adapter_is_refused() {
        val wrong = mapOf<String, (File) -> Unit>(
            "no adapter.json" to { File(it, JSON).delete() },
            "adapter.json is damaged" to { File(it, JSON).writeText("{") },
            "has no 'base'" to { edit(it, "\"base\"", "\"bass\"") },
            "SHA-256" to { edit(it, "\"base\": \"", "\"base\": \"x") },
            "schema_version 2" to { edit(it, "\"schema_version\": 1", "\"schema_version\": 2") },
            "does not list 'other.onnx'" to { edit(it, "\"generate\": \"generate.onnx\"", "\"generate\": \"other.onnx\"") },
            "lies outside" to { edit(it, "\"score.onnx\": {", "\"../score.onnx\": {") },
            "is missing" to { File(it, "score.onnx").delete() },
            "factors.safetensors was changed" to { folder -> File(folder, FACTORS).apply { writeBytes(readBytes().also { it[it.size - 1]++ }) } },
            "generate.onnx was changed" to { folder -> File(folder, "generate.onnx").apply { writeBytes(readBytes().copyOf(100)) } },
        )
        for ((message, damage) in wrong) assertRefuses<AdapterException>(message) { Adapter.open(copy().also(damage)) }
        val factors = mapOf<String, (Map<String, Pair<List<Int>, FloatArray>>) -> Map<String, Pair<List<Int>, FloatArray>>>(
            "no matrix $Q.b" to { it - "$Q.b" },
            "no matrix $Q.a" to { it + ("$Q.a" to (listOf(2) to FloatArray(2))) },
            "has ranks 2 and 3" to { it + ("$Q.b" to (listOf(3, 4) to FloatArray(12))) },
            "$Q.a holds NaN or infinite" to { it + ("$Q.a" to (listOf(4, 2) to FloatArray(8) { Float.NaN })) },
        )
        for ((message, change) in factors) assertRefuses<AdapterException>(message) { Adapter.open(factors(change)) }
    }

    @Test
    fun factors_that_do_not_fit_the_graph_are_refused_and_the_runtime_computes_as_before() = open().use { runtime ->
        val fine = Adapter.open(all[0].adapter!!)
        for (before in listOf(null, fine)) {
            runtime.useAdapter(before)
            val model = if (before == null) alone else all[0]
            for (unfit in listOf(factors { it }, factors { it.mapKeys { (name, _) -> name.replace("q_proj", "odd_proj") } })) {
                assertRefuses<AdapterException>("of $unfit has shape", "its graph has") { runtime.useAdapter(Adapter.open(unfit)) }
                assertEquals(before, runtime.adapter)
                assertArrayEquals(model.logits(), runtime.run(model), 0f)
                runtime.reset()
            }
        }
        // a graph that vanished after it was opened
        val gone = copy()
        val adapter = Adapter.open(gone)
        runtime.useAdapter(null)
        GemmaRuntime.open(bundle, threads = 1).use { other ->
            File(gone, "generate.onnx").writeBytes(ByteArray(9))
            assertRefuses<AdapterException>("generate.onnx was changed") { other.useAdapter(adapter) }
            assertArrayEquals(alone.logits(), other.run(alone), 0f)
        }
    }

    @Test
    fun switching_again_and_again_takes_no_more_memory() = open().use { runtime ->
        val opened = all.map { Adapter.open(it.adapter!!) }
        val resident = List(ROUNDS) {
            for (adapter in opened) runtime.useAdapter(adapter)
            runtime.useAdapter(null)
            System.gc()
            File("/proc/self/status").readLines().first { it.startsWith("VmRSS") }.split(Regex("\\s+"))[1].toInt()
        }
        // what is not freed is not freed any time, so the median tells it from a single jump
        val grown = resident.zipWithNext { before, after -> after - before }.takeLast(ROUNDS / 2).sorted()[ROUNDS / 4]
        assertTrue("resident KiB $resident", grown < opened.sumOf { it.bytes } / 1024 / 4)
    }

    /** A copy of the first adapter, for damage. */
    private fun copy(): File = temporary.newFolder().also { all.first().adapter!!.copyRecursively(it, overwrite = true) }

    private fun edit(folder: File, old: String, new: String) = File(folder, JSON).run {
        check(old in readText()) { "$old is not in ${readText()}" }
        writeText(readText().replaceFirst(old, new))
    }

    /** An adapter of one linear whose factors are of shapes 4 x 2 and 2 x 4, or what [change] makes of them, with the hash that belongs to it. */
    private fun factors(change: (Map<String, Pair<List<Int>, FloatArray>>) -> Map<String, Pair<List<Int>, FloatArray>>): File {
        val folder = copy()
        val tensors = change(mapOf("$Q.a" to (listOf(4, 2) to FloatArray(8)), "$Q.b" to (listOf(2, 4) to FloatArray(8))))
        var offset = 0
        val header = tensors.mapValues { (_, tensor) ->
            val start = offset
            offset += Float.SIZE_BYTES * tensor.second.size
            mapOf("dtype" to "F32", "shape" to tensor.first, "data_offsets" to listOf(start, offset))
        }
        val text = toJson(header).toByteArray()
        val bytes = ByteBuffer.allocate(Long.SIZE_BYTES + text.size + offset).order(ByteOrder.LITTLE_ENDIAN).putLong(text.size.toLong()).put(text)
        for ((_, values) in tensors.values) values.forEach(bytes::putFloat)
        val file = File(folder, FACTORS)
        val manifest = Fixtures.json(File(folder, JSON))["files"][FACTORS]
        file.writeBytes(bytes.array())
        edit(folder, manifest["sha256"].string, gemma.edge.engine.hashOf(file))
        edit(folder, "\"bytes\": ${manifest["bytes"].long}", "\"bytes\": ${file.length()}")
        Safetensors.open(file).close()
        return folder
    }

    private companion object {
        const val JSON = "adapter.json"
        const val FACTORS = "factors.safetensors"
        const val ROUNDS = 30
        const val Q = "model.layers.0.self_attn.q_proj"
    }
}
