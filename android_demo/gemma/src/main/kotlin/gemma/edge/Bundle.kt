package gemma.edge

import java.io.File
import java.io.IOException

/**
 * A folder that gemma-export made: its manifest, checked, and its files. The format is docs/export/bundle-format.md; only what a phone
 * needs of the manifest is read.
 *
 * @property folder where it lies.
 * @property name of the checkpoint that it was made from.
 * @property vocabSize tokens that the model knows.
 * @property bosTokenId first token of every text.
 * @property eosTokenIds tokens that end a text, as the checkpoint says.
 * @property threads that its target takes by default.
 * @property cache geometry of the KV cache.
 * @property residentBytes estimate of what is resident while it generates.
 * @property files every file's size and hash.
 * @property identity hash of all that a saved state of the ONNX backend depends on, as the exporter computed it.
 */
public class Bundle private constructor(
    public val folder: File,
    public val name: String,
    public val vocabSize: Int,
    public val bosTokenId: Int,
    public val eosTokenIds: Set<Int>,
    public val threads: Int,
    public val cache: CacheGeometry,
    public val residentBytes: Long,
    public val files: List<BundleFile>,
    internal val identity: String,
    private val graph: String,
    private val backendFiles: Set<String>,
) {
    /** The graph that generates. */
    internal val generateGraph: File get() = file(graph)

    /** Bytes of all files but the manifest. */
    public val bytes: Long get() = files.sumOf { it.bytes }

    /** Bytes of what the ONNX backend is made of. */
    internal val backendBytes: Long get() = files.filter { it.name in backendFiles }.sumOf { it.bytes }

    /** Bytes of the weights, which a token reads once. */
    internal val weightBytes: Long get() = files.filter { it.name in backendFiles }.maxOf { it.bytes }

    /** Whether the bundle holds a file of that name. */
    internal fun has(name: String): Boolean = files.any { it.name == name }

    /**
     * The path of a file of the bundle; never outside of it.
     *
     * @throws BundleException the name leads out of the folder, or nothing is there.
     */
    public fun file(name: String): File {
        val path = File(folder, name)
        if (!isInside(folder, name)) {
            throw BundleException("$folder/$MANIFEST names '$name', which lies outside the bundle; do not use this bundle")
        }
        if (!path.isFile) throw BundleException("$path is missing; import the bundle again")
        return path
    }

    /**
     * Compare every file with the hash in the manifest. Reads all of it: seconds per gigabyte.
     *
     * @param progress called with the bytes read so far.
     * @throws BundleException the first file that differs.
     */
    public fun checkHashes(progress: (doneBytes: Long) -> Unit = {}) {
        var done = 0L
        for (entry in files) {
            val actual = hashOf(file(entry.name)) { read -> done += read; progress(done) }
            if (actual != entry.sha256) {
                throw BundleException(
                    "$folder/${entry.name} was changed: sha256 ${actual.take(16)}..., " +
                        "the manifest says ${entry.sha256.take(16)}...; import the bundle again",
                )
            }
        }
    }

    public companion object {
        /** The only version of the manifest that this library reads. */
        public const val SCHEMA_VERSION: Int = 3
        internal const val MANIFEST = "manifest.json"
        private const val MAX_MANIFEST_BYTES = 64L shl 20

        /**
         * Read and check a bundle's manifest, and that every file is there with its size. Hashes: [checkHashes].
         *
         * @throws BundleException no bundle, another schema version, a file missing, truncated or outside the folder.
         * @throws UnsupportedException the bundle holds no ONNX backend.
         */
        public fun open(folder: File): Bundle {
            val path = File(folder, MANIFEST)
            if (!path.isFile) throw BundleException("$folder is not a bundle: no $MANIFEST in it; make one with gemma-export")
            if (path.length() > MAX_MANIFEST_BYTES) throw BundleException("$path is larger than $MAX_MANIFEST_BYTES bytes; import the bundle again")
            val bundle = try {
                val manifest = Node(JsonReader.parse(path.readBytes()), MANIFEST)
                val version = manifest["schema_version"].value
                if (version != SCHEMA_VERSION.toLong()) {
                    throw BundleException("$path: schema_version $version, this library reads $SCHEMA_VERSION; export the bundle again")
                }
                read(folder, manifest)
            } catch (error: JsonException) {
                throw BundleException("$path is damaged (${error.message}); import the bundle again", error)
            } catch (error: IOException) {
                throw BundleException("$path cannot be read (${error.message}); import the bundle again", error)
            }
            for (entry in bundle.files) {
                val size = bundle.file(entry.name).length()
                if (size != entry.bytes) {
                    throw BundleException("$folder/${entry.name}: $size bytes, the manifest says ${entry.bytes}; import it again")
                }
            }
            // a name that leads out of the folder is refused when it is opened
            val unlisted = bundle.backendFiles.firstOrNull { !bundle.has(it) && isInside(folder, it) }
            if (unlisted != null) throw BundleException("$path: backends.onnx.settings names '$unlisted', which is not in files; import the bundle again")
            return bundle
        }

        private fun read(folder: File, manifest: Node): Bundle {
            val backends = manifest["backends"]
            if ("onnx" !in backends) {
                throw UnsupportedException("$folder holds no onnx backend, only ${backends.keys.joinToString()}; export with --backend onnx")
            }
            val onnx = manifest["backends"]["onnx"]
            val config = manifest["config"]
            val settings = onnx["settings"]
            val vocabSize = config["vocab_size"].int(1..MAX_TOKENS)
            val files = manifest["files"].entries.map { (name, entry) -> BundleFile(name, entry["bytes"].long, entry["sha256"].sha256) }
            val roles = ROLES.filter { settings[it].value != null }.associateWith { settings[it].string }
            return Bundle(
                folder = folder,
                name = manifest["model"]["name"].string,
                vocabSize = vocabSize,
                bosTokenId = config["bos_token_id"].int(0 until vocabSize),
                eosTokenIds = config["eos_token_id"].list.map { it.int(0 until vocabSize) }.toSet(),
                threads = manifest["target"]["threads"].int(1..MAX_THREADS),
                cache = CacheGeometry.read(onnx["cache"], config),
                residentBytes = onnx["plan"]["device_ram_bytes"].long,
                files = files,
                identity = onnx["identity"].sha256,
                graph = settings["generate"].string,
                backendFiles = roles.values.toSet(),
            )
        }

        private fun hashOf(path: File, progress: (Int) -> Unit): String = sha256 {
            val block = ByteArray(1 shl 20)
            path.inputStream().use { input ->
                while (true) {
                    val read = input.read(block)
                    if (read < 0) break
                    update(block, 0, read)
                    progress(read)
                }
            }
        }
    }
}

/**
 * One file of a bundle.
 *
 * @property name path inside the bundle, with slashes.
 * @property bytes its size.
 * @property sha256 its hash, in hexadecimal.
 */
public class BundleFile internal constructor(public val name: String, public val bytes: Long, public val sha256: String)

/**
 * The KV cache of the whole model: fixed when the bundle is made, whatever is generated.
 *
 * @property context tokens that the model can look back on; beyond it the oldest fall out.
 * @property prefillChunk most tokens in one forward call.
 * @property kvHeads key and value heads of a layer.
 * @property headDim elements of a head.
 * @property int8 whether elements are int8 codes, else float32.
 * @property slots rows allocated, by layer.
 * @property windows keys that a query may see, by layer.
 */
public class CacheGeometry internal constructor(
    public val context: Int,
    public val prefillChunk: Int,
    public val kvHeads: Int,
    public val headDim: Int,
    public val int8: Boolean,
    public val slots: List<Int>,
    public val windows: List<Int>,
) {
    /** Bytes of all K and V buffers. */
    public val bytes: Long get() = 2L * kvHeads * headDim * slots.sumOf { it.toLong() } * elementBytes

    /** Tokens back that a cache can depend on: a layer's oldest key saw the window of the layer below, and so on. */
    internal val reach: Int get() = 1 + windows.sumOf { it - 1 }

    /** Bytes of the keys and values that a token sees at a depth of so many tokens. */
    internal fun bytesSeen(depth: Int): Long = windows.sumOf { minOf(it, depth).toLong() } * 2 * kvHeads * headDim * elementBytes

    private val elementBytes get() = if (int8) 1 else 4

    internal companion object {
        private val DTYPES = mapOf("int8" to true, "float32" to false)
        private const val LOCAL = "sliding_attention"

        /** The geometry in a manifest, as far as it agrees with the model's configuration. */
        fun read(node: Node, config: Node): CacheGeometry {
            val dtype = node["dtype"].string
            val int8 = DTYPES[dtype] ?: throw UnsupportedException("a KV cache of $dtype; this library knows ${DTYPES.keys.joinToString()}")
            val context = node["context"].int(1..MAX_TOKENS)
            val chunk = node["prefill_chunk"].int(1..MAX_CHUNK)
            val kvHeads = node["kv_heads"].equalTo(config["num_key_value_heads"].int(1..MAX_HEADS))
            val headDim = node["head_dim"].equalTo(config["head_dim"].int(1..MAX_HEAD_DIM))
            val layers = node["layers"].list
            val kinds = config["layer_types"].list
            if (layers.size != kinds.size || layers.isEmpty()) node["layers"].fail("a list of ${kinds.size} layers")
            val local = minOf(config["sliding_window"].int(1..MAX_TOKENS), context)
            val windows = layers.zip(kinds) { layer, kind -> layer["window"].equalTo(if (kind.string == LOCAL) local else context) }
            // a buffer's bytes are an Int
            val maxSlots = Int.MAX_VALUE / (Float.SIZE_BYTES * kvHeads * headDim)
            val slots = layers.zip(windows) { layer, window -> layer["slots"].int(window + chunk - 1..minOf(maxSlots, window + 2 * chunk - 2)) }
            return CacheGeometry(context, chunk, kvHeads, headDim, int8, slots, windows)
        }
    }
}

private const val MAX_TOKENS = 1 shl 24 // these ranges are those of bundle/ranges.py
private const val MAX_CHUNK = 4096
private const val MAX_HEADS = 1024
private const val MAX_HEAD_DIM = 4096
private const val MAX_THREADS = 1024
private val ROLES = listOf("generate", "score", "genai", "weights")
private val SHA256 = Regex("[0-9a-f]{64}")

/** Whether a name stays below a folder; false for what is not a file name. */
private fun isInside(folder: File, name: String): Boolean = try {
    !File(name).isAbsolute && File(folder, name).canonicalFile.toPath().startsWith(folder.canonicalFile.toPath())
} catch (error: IOException) {
    false
}

/** A JSON value and where it stands, for messages. */
internal class Node(val value: Any?, private val path: String) {
    private val map get() = value as? Map<*, *> ?: fail("an object")
    val list get() = (value as? List<*> ?: fail("a list")).mapIndexed { index, item -> Node(item, "$path[$index]") }
    val string get() = value as? String ?: fail("text")
    val long get() = (value as? Long)?.takeIf { it >= 0 } ?: fail("a whole number, not negative")
    val sha256 get() = string.takeIf(SHA256::matches) ?: fail("a SHA-256 in hexadecimal")
    val keys get() = map.keys.map { it as String }
    val entries get() = keys.map { it to get(it) }

    operator fun contains(key: String) = key in map

    operator fun get(key: String): Node = if (key in this) Node(map[key], "$path: $key") else throw JsonException("$path has no '$key'")

    fun int(range: IntRange): Int = long.takeIf { it in range.first.toLong()..range.last }?.toInt() ?: fail("a number in $range")

    fun equalTo(expected: Int): Int = if (value == expected.toLong()) expected else fail("$expected, as the rest of the manifest says")

    fun fail(expected: String): Nothing = throw JsonException("$path is not $expected")
}
