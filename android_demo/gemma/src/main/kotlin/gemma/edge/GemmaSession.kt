package gemma.edge

import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.FlowCollector
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext
import java.io.File
import java.util.concurrent.atomic.AtomicInteger

/**
 * A conversation on one runtime. The cache is kept between turns, so a turn costs only its own tokens.
 *
 * Answers are cold flows: nothing is computed before somebody collects, at most one token ahead of the collector, and cancelling
 * the collector's coroutine ends the answer within one token (within one chunk while the prompt is read). What was said by then
 * stands, and the conversation goes on from there. Work runs on [dispatcher], never on the caller's thread; answers wait for each other.
 *
 * @param runtime used by this session alone.
 * @param tokenizer of the same bundle.
 * @param template null where only [complete] is used.
 * @param dispatcher where the model runs.
 */
public class GemmaSession(
    private val runtime: GemmaRuntime,
    private val tokenizer: Tokenizer,
    private val template: ChatTemplate?,
    private val dispatcher: CoroutineDispatcher = Dispatchers.Default,
) : AutoCloseable {
    private val turn = Mutex()
    private var cached = CachedText.NOTHING
    private val fed = IntList() // since the cache was empty
    private val seen = HashSet<Int>() // tokens of the context, for the repetition penalty

    /** The bundle that talks. */
    public val bundle: Bundle get() = runtime.bundle

    /** The conversation so far, the answer that is being given not included. */
    @Volatile
    public var messages: List<Message> = emptyList()
        private set

    /** What the last answer took; null before the first one. */
    @Volatile
    public var stats: AnswerStats? = null
        private set

    /**
     * Say something; the answer comes piece by piece.
     *
     * @param text the user's turn.
     * @param params how tokens are chosen.
     * @param maxTokens most tokens of the answer.
     * @return a flow that throws [InputException] when the template cannot express the turn; the conversation is then as before.
     */
    public fun send(text: String, params: SamplingParams = SamplingParams(), maxTokens: Int = 512): Flow<String> = answer(maxTokens) {
        val template = template ?: throw UnsupportedException("this session has no chat template; use complete, or give it one")
        val asked = messages + Message("user", text)
        val prompt = template.render(asked)
        generate(newTokens(prompt), params, maxTokens, prompt, it) { answer -> remember(asked + Message("assistant", answer)) }
    }

    /**
     * Continue a text as it stands, without the chat format. Ends the conversation: the cache holds this text instead.
     *
     * @return a flow of what follows; see [send].
     */
    public fun complete(prompt: String, params: SamplingParams = SamplingParams(), maxTokens: Int = 512): Flow<String> = answer(maxTokens) {
        val ids = tokenizer.encode(prompt)
        forget()
        remember(emptyList())
        generate(ids, params, maxTokens, prompt, it) {}
    }

    /** Put a conversation in place of the present one, for instance a saved one; it is read again with the next turn. */
    public suspend fun restore(messages: List<Message>): Unit = withContext(dispatcher) {
        turn.withLock {
            forget()
            remember(messages)
        }
    }

    /**
     * Write conversation and cache to one file, for [load] here and `Session.restore` in Python. Waits for an answer that is being given.
     *
     * @throws java.io.IOException it cannot be written.
     */
    public suspend fun save(file: File): Unit = withContext(dispatcher) {
        turn.withLock {
            val known = cached.texts.isNotEmpty() && runtime.position == cached.position
            val ids = if (known) fed.toArray() + cached.pending else IntArray(0)
            runtime.save(file, SavedConversation(messages, ids, if (known) cached.texts else emptySet()).toNotes())
        }
    }

    /**
     * Take up a conversation where it was saved, nothing fed again.
     *
     * @throws StateException no such file, damaged, of another bundle, or no conversation; the present one is then as before.
     */
    public suspend fun load(file: File): Unit = withContext(dispatcher) {
        turn.withLock {
            val notes = runtime.load(file)
            forgetTokens()
            val said = try {
                SavedConversation.of(notes)
            } catch (error: JsonException) {
                throw StateException("$file holds no conversation (${error.message}); save one with GemmaSession.save", error)
            }
            remember(said.messages)
            val position = runtime.position
            val last = runtime.ids
            // else a part of the text was taken back, or is of another conversation: read again with the next turn
            if (position in last.size..said.ids.size && last contentEquals said.ids.copyOfRange(position - last.size, position)) {
                fed.addAll(said.ids.copyOf(position))
                seen.addAll(said.ids.asList())
                cached = CachedText(said.texts, position, said.ids.copyOfRange(position, said.ids.size))
            }
        }
    }

    /** Start a new conversation. */
    public suspend fun reset(): Unit = restore(emptyList())

    /** Free the model's memory. Waits for the token that is being computed. */
    override fun close(): Unit = runtime.close()

    private fun answer(maxTokens: Int, run: suspend FlowCollector<String>.(Handover) -> Unit): Flow<String> = flow {
        if (maxTokens < 1) throw InputException("maxTokens $maxTokens is below 1")
        val handover = Handover()
        val pieces = flow { turn.withLock { run(handover) } }.buffer(Channel.RENDEZVOUS).flowOn(dispatcher)
        pieces.collect { piece -> if (handover.take()) emit(piece) }
    }

    /** The tokens of [prompt] that the cache does not hold yet; empties it where it holds something else. */
    private fun newTokens(prompt: String): IntArray {
        // another position: someone else used the runtime meanwhile
        val held = cached.texts.firstOrNull { prompt.startsWith(it) && runtime.position == cached.position }
        if (held != null) return cached.pending + tokenizer.encode(prompt.removePrefix(held), bos = false)
        forget()
        return tokenizer.encode(prompt)
    }

    private fun forget() {
        runtime.reset()
        forgetTokens()
    }

    private fun forgetTokens() {
        cached = CachedText.NOTHING
        fed.clear()
        seen.clear()
    }

    private fun remember(conversation: List<Message>) {
        messages = conversation.toList()
    }

    /**
     * Feed and answer. A token is fed after its text was emitted, so that text and cache stay the same however the answer ends.
     *
     * @param done is told the answer, also one that was cancelled; not told anything when the prompt was not read to its end.
     */
    private suspend fun FlowCollector<String>.generate(
        ids: IntArray,
        params: SamplingParams,
        maxTokens: Int,
        prompt: String,
        handover: Handover,
        done: (answer: String) -> Unit,
    ) {
        val clock = AnswerClock(ids.size)
        val sampler = Sampler(params, seen)
        val stream = tokenizer.stream()
        var said = IntArray(0) // but not fed yet
        var piece = "" // what the last token added
        var finished = false
        var known = false // what the cache holds: not while the model runs, for that may fail
        cached = CachedText.NOTHING
        ids.forEach(sampler::observe)
        var logits = feed(ids)
        fed.addAll(ids)
        try {
            for (count in 1..maxTokens) {
                known = true
                val token = sampler.sample(logits)
                if (token in tokenizer.stopIds) break
                clock.token()
                said = intArrayOf(token)
                piece = stream.push(token)
                if (piece.isNotEmpty()) emit(handover.offer(piece))
                sampler.observe(token)
                currentCoroutineContext().ensureActive()
                if (count == maxTokens) break // the next logits would be computed for nothing
                known = false
                logits = runtime.decode(token)
                fed.add(token)
                said = IntArray(0)
            }
            finished = true
        } finally {
            stats = clock.stats()
            if (known) {
                val unseen = if (finished) 0 else handover.cut()
                val unseenIsUnfed = unseen == 1 && piece.isNotEmpty() && said.isNotEmpty()
                if (unseenIsUnfed) said = IntArray(0)
                said.forEach(sampler::observe)
                val answer = handover.text.toString()
                // Gemma's template trims an answer; the blanks around it stay in the cache, where the model wrote them
                if (unseen == 0 || unseenIsUnfed) {
                    cached = CachedText(setOf(prompt + answer, prompt + answer.trimmed()), runtime.position, said)
                }
                done(answer)
            }
        }
    }

    /** Read the prompt chunk by chunk, so that it can be cancelled between two of them. */
    private suspend fun feed(ids: IntArray): FloatArray {
        var logits = FloatArray(0)
        for (start in ids.indices step bundle.cache.prefillChunk) {
            currentCoroutineContext().ensureActive()
            logits = runtime.prefill(ids.copyOfRange(start, minOf(start + bundle.cache.prefillChunk, ids.size)))
        }
        return logits
    }

    public companion object {
        /**
         * Open a bundle and start a conversation. Takes seconds, on a thread of its own.
         *
         * @param folder of the bundle.
         * @param threads null takes one for each big core, at most the target's.
         * @param template null takes the bundle's.
         * @throws GemmaException the bundle cannot be used here; see [Bundle.open], [OnnxRuntime.open], [Tokenizer.open], [ChatTemplate.of].
         */
        public suspend fun open(folder: File, threads: Int? = null, template: ChatTemplate? = null): GemmaSession =
            withContext(Dispatchers.IO) {
                val bundle = Bundle.open(folder)
                val format = template ?: ChatTemplate.of(bundle)
                val tokenizer = Tokenizer.open(bundle)
                GemmaSession(OnnxRuntime.open(bundle, threads), tokenizer, format)
            }
    }
}

/**
 * What the cache holds.
 *
 * @property texts the text of it, in the ways a template may write it; none where it is not known.
 * @property position the runtime's position with it.
 * @property pending tokens of the text that were not fed yet.
 */
private class CachedText(val texts: Set<String>, val position: Int, val pending: IntArray) {
    companion object {
        val NOTHING = CachedText(emptySet(), 0, IntArray(0))
    }
}

/**
 * An answer on its way to the collector. When it is cancelled its maker cannot know whether the last piece was taken: the handover may
 * have succeeded and be reported as cancelled all the same. So the collector's side counts.
 */
private class Handover {
    /** What was offered. */
    val text = StringBuilder()
    private val ends = ArrayList<Int>() // of the text, after each piece
    private val taken = AtomicInteger()

    fun offer(piece: String): String {
        text.append(piece)
        ends += text.length
        return piece
    }

    /** The collector is about to get a piece; false where the answer has ended without it. */
    fun take(): Boolean = taken.updateAndGet { if (it < 0) it else it + 1 } > 0

    /** The answer is cancelled: it ends behind the last piece that was taken, and no other is. Pieces that were not. */
    fun cut(): Int {
        val seen = taken.getAndSet(ENDED)
        text.setLength(if (seen == 0) 0 else ends[seen - 1])
        return ends.size - seen
    }

    private companion object {
        const val ENDED = -1
    }
}
