package gemma.edge.state

import gemma.edge.JsonException
import gemma.edge.JsonReader
import gemma.edge.Node
import gemma.edge.StateException
import gemma.edge.engine.StateTensor
import gemma.edge.engine.goTo
import gemma.edge.engine.sha256
import gemma.edge.toJson
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.nio.file.Files
import java.nio.file.StandardCopyOption

/** The description of a state. `State` in runtimes/engines/state.py has the same fields. */
internal data class StateHeader(val identity: String, val position: Int, val written: Int, val notes: String)

/**
 * The state of a runtime in one safetensors file, in the format of the Python runtime (runtimes/engines/state.py). Tensors are read and
 * written one at a time, because all of them together may not fit into an app's heap. Source: safetensors' README, "Format".
 */
internal class StateFile private constructor(
    private val path: File,
    private val channel: FileChannel,
    private val dataStart: Long,
    private val offsets: Map<String, Long>,
    val header: StateHeader,
    val tensors: List<StateTensor>,
) : AutoCloseable {
    /** The bytes of one of the [tensors]. */
    fun read(tensor: StateTensor): ByteBuffer {
        val buffer = ByteBuffer.allocate(tensor.bytes.toInt()).order(ByteOrder.LITTLE_ENDIAN)
        readFully(path, channel, buffer, dataStart + offsets.getValue(tensor.name))
        return buffer
    }

    override fun close(): Unit = channel.close()

    companion object {
        private const val FORMAT = "gemma-edge state 2"
        private const val METADATA = "__metadata__"
        private const val DIGEST = "sha256"

        // MAX_HEADER_BYTES: the limit of the safetensors library.
        private const val MAX_HEADER_BYTES = 100_000_000L

        /** The name of the tensor with the last token ids that were fed. Every state has it. */
        const val IDS = "ids"

        /**
         * Write a state. The file is written whole or not at all.
         *
         * @param data returns the bytes of a tensor, in pieces. It is called twice for each, because the hash stands before the bytes.
         * @throws IOException the file cannot be written.
         */
        fun write(path: File, header: StateHeader, tensors: List<StateTensor>, data: (StateTensor) -> List<ByteBuffer>) {
            val numbers = mapOf("identity" to header.identity, "position" to header.position, "written" to header.written)
            val metadata = mapOf("format" to FORMAT, "state" to toJson(numbers), "notes" to header.notes)
            val entries = LinkedHashMap<String, Any>()
            entries[METADATA] = metadata + (DIGEST to digestOf(metadata, tensors) { tensor -> sha256 { data(tensor).forEach(::update) } })
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
            val channel = RandomAccessFile(path, "r").channel
            try {
                return read(path, channel)
            } catch (error: Exception) {
                channel.close()
                when (error) {
                    is JsonException, is IOException -> throw StateException("$path is damaged (${error.message}); save it again", error)
                    else -> throw error
                }
            }
        }

        private fun read(path: File, channel: FileChannel): StateFile {
            val size = ByteBuffer.allocate(Long.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN)
            readFully(path, channel, size, 0)
            val length = size.getLong(0)
            val rest = channel.size() - Long.SIZE_BYTES
            if (length !in 0..minOf(rest, MAX_HEADER_BYTES)) throw JsonException("a header of $length bytes")
            val text = ByteBuffer.allocate(length.toInt())
            readFully(path, channel, text, Long.SIZE_BYTES.toLong())
            val root = Node(JsonReader.parse(text.array()), path.name)
            val header = headerOf(path, root)
            val offsets = HashMap<String, Long>()
            val tensors = root.entries.filter { it.first != METADATA }.map { (name, entry) ->
                val dtype = entry["dtype"].string
                if (dtype !in StateTensor.ITEM_BYTES) throw JsonException("$name is of $dtype")
                val tensor = StateTensor(name, dtype, entry["shape"].list.map { it.int(0..Int.MAX_VALUE) })
                val (start, end) = entry["data_offsets"].list.map { it.long }
                if (end - start != tensor.bytes || end > rest - length || tensor.bytes > Int.MAX_VALUE) throw JsonException("$name lies outside")
                offsets[name] = start
                tensor
            }
            val file = StateFile(path, channel, Long.SIZE_BYTES + length, offsets, header, tensors)
            val texts = root[METADATA].entries.associate { (key, text) -> key to text.string }
            val digest = digestOf(texts - DIGEST, tensors) { tensor -> sha256 { update(file.read(tensor)) } }
            if (digest != texts[DIGEST]) throw JsonException("its bytes were changed")
            return file
        }

        /** The hash of a state: `_digest` in runtimes/engines/state.py. */
        private fun digestOf(metadata: Map<String, String>, tensors: List<StateTensor>, hash: (StateTensor) -> String): String {
            val texts = metadata.map { (key, text) -> "$key ${sha256 { update(text.toByteArray()) }}" }
            val lines = texts + tensors.map { "${it.name} ${it.dtype} ${it.shape.joinToString(",")} ${hash(it)}" }
            return sha256 { update(lines.sorted().joinToString("\n").toByteArray()) }
        }

        private fun headerOf(path: File, root: Node): StateHeader {
            val metadata = if (METADATA in root) root[METADATA] else null
            if (metadata == null || "format" !in metadata || metadata["format"].value != FORMAT) {
                throw StateException("$path is not a saved state, or is of another version; save it again")
            }
            val state = Node(JsonReader.parse(metadata["state"].string.toByteArray()), "state")
            val written = state["written"].int(0..Int.MAX_VALUE)
            return StateHeader(state["identity"].string, state["position"].int(0..written), written, metadata["notes"].string)
        }

        private fun long(value: Long) = ByteBuffer.allocate(Long.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN).putLong(0, value)

        private fun writeFully(channel: FileChannel, bytes: ByteBuffer) {
            while (bytes.hasRemaining()) channel.write(bytes)
        }

        private fun readFully(path: File, channel: FileChannel, buffer: ByteBuffer, start: Long) {
            while (buffer.hasRemaining()) {
                if (channel.read(buffer, start + buffer.position()) < 0) throw JsonException("$path ends too early")
            }
            buffer.goTo(0)
        }
    }
}
