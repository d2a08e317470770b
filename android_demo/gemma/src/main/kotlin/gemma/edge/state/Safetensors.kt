package gemma.edge.state

import gemma.edge.JsonException
import gemma.edge.JsonReader
import gemma.edge.Node
import gemma.edge.engine.StoredTensor
import gemma.edge.engine.goTo
import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * An open safetensors file. Its tensors are read one at a time, because all of them together may not fit into an app's heap. Source:
 * safetensors' README, "Format".
 *
 * @property metadata the texts in the header.
 * @property tensors in the order of the header.
 */
internal class Safetensors private constructor(
    private val path: File,
    private val channel: FileChannel,
    private val dataStart: Long,
    private val offsets: Map<String, Long>,
    val metadata: Map<String, String>,
    val tensors: List<StoredTensor>,
) : AutoCloseable {
    /** The bytes of one of the [tensors]. */
    fun read(tensor: StoredTensor): ByteBuffer {
        val buffer = ByteBuffer.allocate(tensor.bytes.toInt()).order(ByteOrder.LITTLE_ENDIAN)
        readFully(path, channel, buffer, dataStart + offsets.getValue(tensor.name))
        return buffer
    }

    override fun close(): Unit = channel.close()

    companion object {
        const val METADATA = "__metadata__"

        // MAX_HEADER_BYTES: the limit of the safetensors library.
        private const val MAX_HEADER_BYTES = 100_000_000L

        /**
         * Read the header of a file.
         *
         * @throws JsonException it is none of this format, or a tensor lies outside the file.
         * @throws java.io.IOException it cannot be read.
         */
        fun open(path: File): Safetensors {
            val channel = RandomAccessFile(path, "r").channel
            var complete = false
            try {
                return read(path, channel).also { complete = true }
            } finally {
                if (!complete) channel.close()
            }
        }

        private fun read(path: File, channel: FileChannel): Safetensors {
            val size = ByteBuffer.allocate(Long.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN)
            readFully(path, channel, size, 0)
            val length = size.getLong(0)
            val rest = channel.size() - Long.SIZE_BYTES
            if (length !in 0..minOf(rest, MAX_HEADER_BYTES)) throw JsonException("a header of $length bytes")
            val text = ByteBuffer.allocate(length.toInt())
            readFully(path, channel, text, Long.SIZE_BYTES.toLong())
            val root = Node(JsonReader.parse(text.array()), path.name)
            val metadata = if (METADATA in root) root[METADATA].entries.associate { (key, value) -> key to value.string } else emptyMap()
            val offsets = HashMap<String, Long>()
            val tensors = root.entries.filter { it.first != METADATA }.map { (name, entry) ->
                val dtype = entry["dtype"].string
                if (dtype !in StoredTensor.ITEM_BYTES) throw JsonException("$name is of $dtype")
                val tensor = StoredTensor(name, dtype, entry["shape"].list.map { it.int(0..Int.MAX_VALUE) })
                val (start, end) = entry["data_offsets"].list.map { it.long }.also { if (it.size != 2) entry["data_offsets"].fail("two numbers") }
                if (tensor.bytes < 0 || end - start != tensor.bytes || end > rest - length) throw JsonException("$name lies outside")
                offsets[name] = start
                tensor
            }
            return Safetensors(path, channel, Long.SIZE_BYTES + length, offsets, metadata, tensors)
        }

        private fun readFully(path: File, channel: FileChannel, buffer: ByteBuffer, start: Long) {
            while (buffer.hasRemaining()) {
                if (channel.read(buffer, start + buffer.position()) < 0) throw JsonException("$path ends too early")
            }
            buffer.goTo(0)
        }
    }
}
