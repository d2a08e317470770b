package gemma.edge.state

import gemma.edge.JsonException
import gemma.edge.JsonReader
import gemma.edge.Node
import gemma.edge.StateException
import gemma.edge.engine.StoredTensor
import gemma.edge.engine.sha256
import gemma.edge.toJson
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.nio.file.Files
import java.nio.file.StandardCopyOption

/** The description of a state. `State` in runtimes/engines/state.py has the same fields. */
internal data class StateHeader(val identity: String, val position: Int, val written: Int, val pinned: Int, val notes: String)

/**
 * The state of a runtime in one safetensors file, in the format of the Python runtime (runtimes/engines/state.py). Tensors are read and
 * written one at a time.
 */
internal class StateFile private constructor(private val file: Safetensors, val header: StateHeader) : AutoCloseable by file {
    val tensors: List<StoredTensor> get() = file.tensors

    /** The bytes of one of the [tensors]. */
    fun read(tensor: StoredTensor): ByteBuffer = file.read(tensor)

    companion object {
        private const val FORMAT = "gemma-edge state 2"
        private const val DIGEST = "sha256"

        /** The name of the tensor with the last token ids that were fed. Every state has it. */
        const val IDS = "ids"

        /** The name of the tensor with the ids of the pinned tokens. It is absent if there are none. */
        const val FIRST = "first"

        /**
         * Write a state. The file is written whole or not at all.
         *
         * @param data returns the bytes of a tensor, in pieces. It is called twice for each, because the hash stands before the bytes.
         * @throws IOException the file cannot be written.
         */
        fun write(path: File, header: StateHeader, tensors: List<StoredTensor>, data: (StoredTensor) -> List<ByteBuffer>) {
            val numbers = mapOf("identity" to header.identity, "position" to header.position, "written" to header.written) +
                (if (header.pinned > 0) mapOf("pinned" to header.pinned) else emptyMap())
            val metadata = mapOf("format" to FORMAT, "state" to toJson(numbers), "notes" to header.notes)
            val entries = LinkedHashMap<String, Any>()
            entries[Safetensors.METADATA] = metadata + (DIGEST to digestOf(metadata, tensors) { tensor -> sha256 { data(tensor).forEach(::update) } })
            var offset = 0L
            for (tensor in tensors) {
                val end = offset + tensor.bytes
                entries[tensor.name] = mapOf("dtype" to tensor.dtype, "shape" to tensor.shape, "data_offsets" to listOf(offset, end))
                offset = end
            }
            val text = toJson(entries).toByteArray()
            val blanks = -text.size and 7 // the tensors begin at a multiple of 8 bytes
            val partial = File(path.absoluteFile.parentFile, ".${path.name}.partial")
            try {
                partial.outputStream().channel.use { channel ->
                    writeFully(channel, long(text.size.toLong() + blanks))
                    writeFully(channel, ByteBuffer.wrap(text + ByteArray(blanks) { ' '.code.toByte() }))
                    for (tensor in tensors) for (piece in data(tensor)) writeFully(channel, piece)
                }
                Files.move(partial.toPath(), path.toPath(), StandardCopyOption.REPLACE_EXISTING)
            } finally {
                partial.delete()
            }
        }

        /**
         * Open a state that [write] or the Python runtime wrote.
         *
         * @throws StateException the file is missing or damaged, or is not a state.
         */
        fun open(path: File): StateFile {
            if (!path.isFile) throw StateException("$path is not a file; save a state first")
            var file: Safetensors? = null
            try {
                file = Safetensors.open(path)
                val header = headerOf(path, file.metadata)
                val digest = digestOf(file.metadata - DIGEST, file.tensors) { tensor -> sha256 { update(file.read(tensor)) } }
                if (digest != file.metadata[DIGEST]) throw JsonException("its bytes were changed")
                return StateFile(file, header)
            } catch (error: Exception) {
                file?.close()
                when (error) {
                    is JsonException, is IOException -> throw StateException("$path is damaged (${error.message}); save it again", error)
                    else -> throw error
                }
            }
        }

        /** The hash of a state: `_digest` in runtimes/engines/state.py. */
        private fun digestOf(metadata: Map<String, String>, tensors: List<StoredTensor>, hash: (StoredTensor) -> String): String {
            val texts = metadata.map { (key, text) -> "$key ${sha256 { update(text.toByteArray()) }}" }
            val lines = texts + tensors.map { "${it.name} ${it.dtype} ${it.shape.joinToString(",")} ${hash(it)}" }
            return sha256 { update(lines.sorted().joinToString("\n").toByteArray()) }
        }

        private fun headerOf(path: File, metadata: Map<String, String>): StateHeader {
            if (metadata["format"] != FORMAT) {
                throw StateException("$path is not a saved state, or is of another version; save it again")
            }
            fun text(key: String) = metadata[key] ?: throw JsonException("its header has no '$key'")
            val state = Node(JsonReader.parse(text("state").toByteArray()), "state")
            val written = state["written"].int(0..Int.MAX_VALUE)
            val pinned = if ("pinned" in state) state["pinned"].int(0..Int.MAX_VALUE) else 0
            return StateHeader(state["identity"].string, state["position"].int(0..written), written, pinned, text("notes"))
        }

        private fun long(value: Long) = ByteBuffer.allocate(Long.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN).putLong(0, value)

        private fun writeFully(channel: FileChannel, bytes: ByteBuffer) {
            while (bytes.hasRemaining()) channel.write(bytes)
        }
    }
}
