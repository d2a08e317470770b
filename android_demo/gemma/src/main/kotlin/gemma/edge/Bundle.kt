package gemma.edge

import gemma.edge.engine.hashOf
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
 * @property backends those that this library knows, in the order of the manifest.
 * @property backendNames the names of all backends, also of those that this library does not know.
 * @property files every file's size and hash.
 */
public class Bundle private constructor(
    public val folder: File,
    public val name: String,
    public val vocabSize: Int,
    public val bosTokenId: Int,
    public val eosTokenIds: Set<Int>,
    public val threads: Int,
    public val backends: List<Backend>,
    public val backendNames: List<String>,
    public val files: List<BundleFile>,
) {
    /** Bytes of all files but the manifest. */
    public val bytes: Long get() = files.sumOf { it.bytes }

    /**
     * The backend of that name.
     *
     * @throws UnsupportedException the bundle does not hold it, or this library does not know it.
     */
    public fun backend(name: String): Backend = backends.firstOrNull { it.name == name }
        ?: throw UnsupportedException("$folder holds no '$name' backend that this library can run; it holds ${backendNames.joinToString()}")

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
        for (entry in files) checkHash(entry) { read -> done += read; progress(done) }
    }

    /** Compare one file with the hash in the manifest; [progress] is called with the number of bytes of each block that was read. */
    internal fun checkHash(entry: BundleFile, progress: (bytes: Int) -> Unit = {}) {
        val actual = hashOf(file(entry.name), progress)
        if (actual == entry.sha256) return
        throw BundleException(
            "$folder/${entry.name} was changed: sha256 ${actual.take(16)}..., " +
                "the manifest says ${entry.sha256.take(16)}...; import the bundle again",
        )
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
         * @throws UnsupportedException its KV cache is of a type that this library does not know.
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
            return bundle
        }

        private fun read(folder: File, manifest: Node): Bundle {
            val config = manifest["config"]
            val vocabSize = config["vocab_size"].int(1..MAX_TOKENS)
            val files = manifest["files"].entries.map { (name, entry) -> BundleFile(name, entry["bytes"].long, entry["sha256"].sha256) }
            val names = manifest["backends"].keys
            return Bundle(
                folder = folder,
                name = manifest["model"]["name"].string,
                vocabSize = vocabSize,
                bosTokenId = config["bos_token_id"].int(0 until vocabSize),
                eosTokenIds = config["eos_token_id"].list.map { it.int(0 until vocabSize) }.toSet(),
                threads = manifest["target"]["threads"].int(1..MAX_THREADS),
                backends = names.filter { it in FILES_OF }.map { readBackend(it, manifest, files) },
                backendNames = names,
                files = files,
            )
        }

        private fun readBackend(name: String, manifest: Node, files: List<BundleFile>): Backend {
            val backend = manifest["backends"][name]
            val settings = backend["settings"]
            val plan = backend["plan"]
            val roles = FILES_OF.getValue(name)
            val names = roles.filter { it == roles.first() || settings[it].value != null }.map { settings[it].string }
            val unlisted = names.firstOrNull { path -> files.none { it.name == path } }
            if (unlisted != null) throw JsonException("backends: $name: settings names '$unlisted', which is not in files")
            return Backend(
                name = name,
                cache = CacheGeometry.read(backend["cache"], manifest["config"]),
                plan = MemoryPlan(plan["weights_bytes"].long, plan["kv_bytes"].long, plan["device_ram_bytes"].long),
                files = files.filter { it.name in names },
                program = names.first(),
                signatures = if (name == TFLITE) settings["signatures"].list.mapNotNull(::readSignature) else emptyList(),
                identity = backend["identity"].sha256,
                accelerator = if ("accelerator" in backend) backend["accelerator"].oneOf(ACCELERATORS) else CPU,
            )
        }

        /** A signature of a TFLite model; null if it is for scoring, which this library does not do. */
        private fun readSignature(node: Node): Signature? {
            val role = node["role"].oneOf(SIGNATURE_ROLES)
            val longest = if (node["longest"].value == null) null else node["longest"].int(1..MAX_TOKENS)
            val tokens = node["tokens"].int(1..MAX_CHUNK)
            return if (role == "score") null else Signature(node["name"].string, role == "prefill", tokens, longest)
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

internal const val MAX_TOKENS = 1 shl 24 // these ranges are those of bundle/ranges.py
internal const val MAX_CHUNK = 4096
internal const val MAX_PINNED = 1 shl 16
internal const val MAX_HEADS = 1024
internal const val MAX_HEAD_DIM = 4096
private const val MAX_THREADS = 1024
private const val TFLITE = "tflite"

// FILES_OF: the keys of a backend's settings that name its files, the one of the file that its engine loads first
private val FILES_OF = mapOf(
    "onnx" to listOf("generate", "score", "genai", "weights"),
    "executorch" to listOf("program"),
    TFLITE to listOf("program"),
)
private val SIGNATURE_ROLES = listOf("prefill", "decode", "score")
internal const val CPU = "cpu"
internal const val GPU = "gpu"
private val ACCELERATORS = listOf(CPU, GPU, "npu:qualcomm", "coreml", "vulkan") // bundle/accelerators.py
private val SHA256 = Regex("[0-9a-f]{64}")

/** Whether a name stays below a folder; false for what is not a file name. */
internal fun isInside(folder: File, name: String): Boolean = try {
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

    fun oneOf(allowed: List<String>): String = string.takeIf { it in allowed } ?: fail("one of ${allowed.joinToString()}")

    fun fail(expected: String): Nothing = throw JsonException("$path is not $expected")
}
