package gemma.edge

import gemma.edge.state.SavedConversation
import gemma.edge.text.IntList
import gemma.edge.text.StopTexts
import java.io.File
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
import kotlinx.coroutines.sync.withLock
import kotlinx.coroutines.withContext

/**
 * A conversation on one runtime. The session keeps the cache between turns, so each turn feeds only its new tokens.
 *
 * Answers are cold flows. Nothing is computed before the flow is collected, and the model is at most one token ahead of the collector.
 * Cancelling the collector's coroutine ends the answer within one token, or within one chunk while the prompt is read. The text
 * received by then stays in the conversation. The model runs on [dispatcher], never on the caller's thread, and gives one answer at a
 * time.
 *
 * @param runtime the runtime. Several sessions may share it, also with different adapters: each feeds its own tokens again after another
 *   one has answered. Nothing else may use it.
 * @param tokenizer the tokenizer of the same bundle.
 * @param template the chat format; it may be null if only [complete] is used.
 * @param dispatcher where the model runs.
 * @param adapter computes the answers together with the bundle; null takes the one that the runtime has now, if any.
 * @param pinSystem whether the model goes on seeing what stands before the user's own first words, such as a system message or [prefix],
 *   when the conversation is longer than the context. The bundle must keep so many tokens (`gemma-export --pinned`), else it keeps none.
 * @param prefix text in front of the first turn, such as instructions or [Tools.offer], because Gemma has no turn of the system's own.
 */
public class GemmaSession(
    private val runtime: GemmaRuntime,
    private val tokenizer: Tokenizer,
    private val template: ChatTemplate?,
    private val dispatcher: CoroutineDispatcher = Dispatchers.Default,
    adapter: Adapter? = null,
    private val pinSystem: Boolean = true,
    private val prefix: String = "",
) : AutoCloseable {
    private val shared = Shared.of(runtime)
    private val self = Any()
    private var cached = CachedText.NOTHING
    private var before = prefix // the prefix of this conversation, which may be a saved one
    private val fed = IntList() // ids of all tokens fed since the cache was empty
    private val seen = HashSet<Int>() // distinct ids of the context, for the repetition penalty

    /** The adapter that computes the answers together with the bundle, if any. */
    public val adapter: Adapter? = adapter ?: runtime.adapter

    /** The bundle of the runtime. */
    public val bundle: Bundle get() = runtime.bundle

    /** The backend that answers. */
    public val backend: Backend get() = runtime.backend

    /**
     * The number of tokens read and written since the conversation began. The model looks back on as many of them as the backend's
     * context holds; older ones have fallen out.
     */
    public val position: Int get() = runtime.position

    /** The conversation so far, without the answer that is being given. */
    @Volatile
    public var messages: List<Message> = emptyList()
        private set

    /** The speed and length of the last answer; null before the first one. */
    @Volatile
    public var stats: AnswerStats? = null
        private set

    /**
     * Send the user's next message. The flow emits the answer piece by piece.
     *
     * @param text the message.
     * @param params how the tokens of the answer are chosen.
     * @param maxTokens the answer ends after this many tokens at the latest.
     * @param stop texts that end the answer and are not part of it.
     * @return the answer. Collecting it throws [InputException] if the template cannot express the message; the conversation is then
     *   unchanged.
     */
    public fun send(
        text: String,
        params: SamplingParams = SamplingParams(),
        maxTokens: Int = 512,
        stop: List<String> = emptyList(),
    ): Flow<String> = answer(maxTokens, stop) {
        val template = template
            ?: throw UnsupportedException("this session has no chat template; call complete, or pass a template to the session")
        val history = messages + Message("user", if (messages.none { it.role == "user" }) before + text else text)
        val prompt = template.render(history)
        val ids = pinned(newTokens(prompt)) { all -> beginning(all, prompt, template.render(opening(history)), tokenizer::encode) }
        generate(ids, Wanted(params, maxTokens, stop), prompt, it) { answer -> remember(history + Message("assistant", answer)) }
    }

    /**
     * Continue a text without the chat format. This ends the conversation, because the cache now holds the text.
     *
     * @return the continuation; see [send].
     */
    public fun complete(
        prompt: String,
        params: SamplingParams = SamplingParams(),
        maxTokens: Int = 512,
        stop: List<String> = emptyList(),
    ): Flow<String> = answer(maxTokens, stop) {
        val ids = tokenizer.encode(prompt)
        forget()
        remember(emptyList())
        runtime.pin(0)
        generate(ids, Wanted(params, maxTokens, stop), prompt, it) {}
    }

    /** Replace the conversation, for example by a saved one, whose first turn holds its prefix. The next turn feeds all of it. */
    public suspend fun restore(messages: List<Message>): Unit = onRuntime {
        forget()
        before = if (messages.any { it.role == "user" }) "" else prefix
        remember(messages)
    }

    /**
     * Write the conversation and the runtime's state to one file, for [load] here and `Session.restore` in Python. If an answer is being given, this waits until it ends.
     *
     * @throws java.io.IOException the file cannot be written.
     */
    public suspend fun save(file: File): Unit = onRuntime {
        val known = cached.texts.isNotEmpty() && (runtime.position == cached.position || runtime.position == 0)
        val ids = if (known) fed.toArray() + cached.pending else IntArray(0)
        runtime.save(file, SavedConversation(messages, ids, if (known) cached.texts else emptySet(), before).toNotes())
    }

    /**
     * Continue a saved conversation. Only the ExecuTorch backend feeds the saved tokens again.
     *
     * @throws StateException the file is missing, is damaged, is of another bundle or adapter, or holds no conversation. If the runtime
     *   could not load it, the present conversation is unchanged.
     */
    public suspend fun load(file: File): Unit = onRuntime {
        val notes = runtime.load(file)
        forgetTokens()
        val saved = try {
            SavedConversation.of(notes)
        } catch (error: JsonException) {
            throw StateException("$file holds no conversation (${error.message}); save one with GemmaSession.save", error)
        }
        before = saved.before
        remember(saved.messages)
        val position = runtime.position
        val last = runtime.ids
        // if tokens were taken back, the cache holds other tokens than the conversation; then the next turn feeds all again
        if (position in last.size..saved.ids.size && last contentEquals saved.ids.copyOfRange(position - last.size, position)) {
            fed.addAll(saved.ids.copyOf(position))
            seen.addAll(saved.ids.asList())
            cached = CachedText(saved.texts, position, saved.ids.copyOfRange(position, saved.ids.size))
        }
    }

    /** Start a new conversation. */
    public suspend fun reset(): Unit = restore(emptyList())

    /** Free the model's memory. If a token is being computed, this waits for it. */
    override fun close(): Unit = runtime.close()

    private fun answer(maxTokens: Int, stop: List<String>, run: suspend FlowCollector<String>.(Handover) -> Unit): Flow<String> = flow {
        if (maxTokens < 1) throw InputException("maxTokens $maxTokens is below 1")
        if (stop.any { it.isEmpty() }) throw InputException("stop holds an empty text; give texts that have a character")
        val handover = Handover()
        val pieces = flow { alone { run(handover) } }.buffer(Channel.RENDEZVOUS).flowOn(dispatcher)
        pieces.collect { piece -> if (handover.receive()) emit(piece) }
    }

    /** Run [act] where the model runs, after the answer that is being given, and with this session's adapter. */
    private suspend fun onRuntime(act: () -> Unit): Unit = withContext(dispatcher) { alone(act) }

    /** Run [act] while no other session uses the runtime. If another one did, the cache is empty. */
    private suspend inline fun alone(act: () -> Unit) = shared.turn.withLock {
        runtime.useAdapter(adapter)
        if (shared.last !== self) runtime.reset()
        shared.last = self
        act()
    }

    /** The tokens that must be fed, so that the cache holds [prompt]. If it holds anything but a beginning of it, it is emptied. */
    private fun newTokens(prompt: String): IntArray {
        val beginning = cached.texts.firstOrNull(prompt::startsWith)
        if (beginning == null) {
            forget()
            return tokenizer.encode(prompt)
        }
        val new = cached.pending + tokenizer.encode(prompt.removePrefix(beginning), bos = false)
        if (runtime.position == cached.position) return new
        // another session has used the runtime: the same tokens again, because those of the text may be others
        val again = fed.toArray()
        runtime.reset()
        fed.clear()
        return again + new
    }

    /** Pin as many tokens as [count] says of the whole text, and return those to feed: [new], or all if the runtime began anew. */
    private fun pinned(new: IntArray, count: (all: IntArray) -> Int): IntArray {
        val most = backend.cache.pinned
        val all = fed.toArray() + new
        runtime.pin(if (pinSystem && most > 0) count(all).let { if (it <= most) it else 0 } else 0)
        if (runtime.position > 0) return new
        fed.clear()
        return all
    }

    /** A conversation that begins as [history] does, up to the user's own words. */
    private fun opening(history: List<Message>) = history.takeWhile { it.role != "user" } + Message("user", before + OTHER_WORDS)

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
     * Feed [ids], then choose tokens and emit their text until the answer ends. A token is fed only after its text was emitted.
     * Therefore the cache and the text of the conversation agree, no matter how the answer ends.
     *
     * @param prompt the text of everything in the cache after [ids].
     * @param done called with the complete answer, or with the received part of a cancelled one. It is not called if the prompt was not
     *   fed completely, or if the model failed.
     */
    private suspend fun FlowCollector<String>.generate(
        ids: IntArray,
        wanted: Wanted,
        prompt: String,
        handover: Handover,
        done: (answer: String) -> Unit,
    ) {
        val clock = AnswerClock(ids.size)
        val sampler = Sampler(wanted.params, seen)
        val stops = StopTexts(wanted.stop)
        val stream = tokenizer.stream()
        var unfed = IntArray(0) // the last token, until it is fed
        var piece = "" // the text that the last token added
        var finished = false
        var cacheIsKnown = false // false while the model runs, because it may fail
        cached = CachedText.NOTHING
        ids.forEach(sampler::observe)
        var logits = feed(ids)
        fed.addAll(ids)
        try {
            for (count in 1..wanted.maxTokens) {
                cacheIsKnown = true
                val token = sampler.sample(logits)
                if (token in tokenizer.stopIds) break
                clock.token()
                unfed = intArrayOf(token)
                piece = stops.push(stream.push(token))
                if (piece.isNotEmpty()) emit(handover.offer(piece))
                if (stops.found) break
                sampler.observe(token)
                currentCoroutineContext().ensureActive()
                if (count == wanted.maxTokens) break // nobody needs the next logits
                cacheIsKnown = false
                logits = runtime.decode(token)
                fed.add(token)
                unfed = IntArray(0)
            }
            piece = stops.rest()
            if (piece.isNotEmpty()) emit(handover.offer(piece))
            finished = true
        } finally {
            stats = clock.stats()
            if (cacheIsKnown) {
                val dropped = if (finished) 0 else handover.cut()
                // a dropped piece whose token was not fed leaves nothing in the cache
                val droppedIsUnfed = dropped == 1 && piece.isNotEmpty() && unfed.isNotEmpty()
                if (droppedIsUnfed) unfed = IntArray(0)
                unfed.forEach(sampler::observe)
                val answer = handover.text.toString()
                // the cache holds the blanks around the answer, which Gemma's template trims when it renders the next prompt
                // with stop texts the cache may hold tokens whose text was not given
                if (if (wanted.stop.isEmpty()) dropped == 0 || droppedIsUnfed else finished && !stops.found) {
                    cached = CachedText(setOf(prompt + answer, prompt + answer.trimmed()), runtime.position, unfed)
                }
                done(answer)
            }
        }
    }

    /** Feed tokens chunk by chunk, so that feeding can be cancelled between two chunks. */
    private suspend fun feed(ids: IntArray): FloatArray {
        var logits = FloatArray(0)
        for (start in ids.indices step runtime.backend.cache.prefillChunk) {
            currentCoroutineContext().ensureActive()
            logits = runtime.prefill(ids.copyOfRange(start, minOf(start + runtime.backend.cache.prefillChunk, ids.size)))
        }
        return logits
    }

    public companion object {
        /**
         * Open a bundle and start a conversation. This takes seconds and does not block the caller's thread.
         *
         * @param folder the bundle's folder.
         * @param backend the backend to run; null takes the first one that has an engine on the class path.
         * @param threads number of threads; null takes one per big core, but no more than the bundle's target has.
         * @param cacheDir folder of the app for files that make the next start faster; null keeps none.
         * @param template the chat format; null takes the bundle's.
         * @param adapter folder of an adapter of the bundle, which computes the answers together with it.
         * @param pinSystem as in [GemmaSession].
         * @param prefix as in [GemmaSession].
         * @throws GemmaException the bundle cannot be used here; see [Bundle.open], [GemmaRuntime.open], [GemmaRuntime.useAdapter],
         *   [Adapter.open], [Tokenizer.open], [ChatTemplate.of].
         */
        public suspend fun open(
            folder: File,
            backend: String? = null,
            threads: Int? = null,
            cacheDir: File? = null,
            template: ChatTemplate? = null,
            adapter: File? = null,
            pinSystem: Boolean = true,
            prefix: String = "",
        ): GemmaSession = withContext(Dispatchers.IO) {
            val bundle = Bundle.open(folder)
            val format = template ?: ChatTemplate.of(bundle)
            val tokenizer = Tokenizer.open(bundle)
            val opened = adapter?.let(Adapter::open)
            val runtime = GemmaRuntime.open(bundle, backend, threads, cacheDir)
            try {
                runtime.useAdapter(opened)
            } catch (error: GemmaException) {
                runtime.close()
                throw error
            }
            GemmaSession(runtime, tokenizer, format, pinSystem = pinSystem, prefix = prefix)
        }
    }
}
