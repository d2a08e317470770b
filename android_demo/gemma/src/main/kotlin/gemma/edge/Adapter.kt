package gemma.edge

import gemma.edge.engine.EngineApi
import gemma.edge.engine.Factor
import gemma.edge.engine.FactorFile
import gemma.edge.engine.hashOf
import java.io.File
import java.io.IOException

/**
 * A LoRA beside a bundle, which `gemma-export adapter` made: the factors of its linears, and a graph of the bundle that takes them. The
 * format is docs/export/adapters.md. [GemmaRuntime.useAdapter] computes with it, [GemmaSession] answers with it.
 *
 * @property folder where it lies.
 * @property name of the folder or the id of the LoRA that it was made from.
 * @property rank the largest rank of its factors.
 * @property bytes of memory that it takes while it is used.
 */
public class Adapter private constructor(
    public val folder: File,
    public val name: String,
    public val rank: Int,
    public val bytes: Long,
    internal val base: String, // identity of the backend that it was made for
    private val factors: FactorFile,
    private val graph: BundleFile,
    internal val digest: String, // of the factors
) {
    /** The hash of the graph: the adapters of one bundle have the same one. */
    @EngineApi
    public val graphDigest: String get() = graph.sha256

    /** The graph's file. */
    @EngineApi
    public val graphFile: File get() = File(folder, graph.name)

    /** Read the factors one by one. */
    @EngineApi
    public fun forEachFactor(act: (Factor) -> Unit): Unit = reading(factors.path) { factors.forEach(act) }

    public companion object {
        private const val ADAPTER = "adapter.json"
        private const val FACTORS = "factors.safetensors"
        private const val SCHEMA_VERSION = 1L
        private const val MAX_MANIFEST_BYTES = 64L shl 20
        private const val HINT = "import it again, or make it again with gemma-export adapter"

        /**
         * Read and check an adapter's folder: hashes, and every factor.
         *
         * @throws AdapterException it is none, or a file is missing, damaged, changed or outside the folder.
         */
        @OptIn(EngineApi::class)
        public fun open(folder: File): Adapter {
            val path = File(folder, ADAPTER)
            if (!path.isFile) throw AdapterException("$folder is not an adapter of a bundle: no $ADAPTER in it; make one with gemma-export adapter")
            if (path.length() > MAX_MANIFEST_BYTES) throw AdapterException("$path is larger than $MAX_MANIFEST_BYTES bytes; $HINT")
            return reading(path) {
                val manifest = Node(JsonReader.parse(path.readBytes()), ADAPTER)
                val version = manifest["schema_version"].value
                if (version != SCHEMA_VERSION) throw AdapterException("$path: schema_version $version, this library reads $SCHEMA_VERSION; $HINT")
                val files = manifest["files"].entries.associate { (name, entry) -> name to BundleFile(name, entry["bytes"].long, entry["sha256"].sha256) }
                fun listed(name: String) = files[name] ?: throw JsonException("$ADAPTER does not list '$name' in files")
                val graph = listed(manifest["graphs"]["generate"].string)
                for (file in files.values) checkFile(folder, file)
                val factors = FactorFile(File(folder, listed(FACTORS).name))
                var values = 0L
                reading(factors.path) { factors.forEach { values += it.values.size } }
                Adapter(
                    folder = folder,
                    name = manifest["name"].string,
                    rank = manifest["rank"].int(0..Int.MAX_VALUE),
                    bytes = values * Float.SIZE_BYTES,
                    base = manifest["base"].sha256,
                    factors = factors,
                    graph = graph,
                    digest = listed(FACTORS).sha256,
                )
            }
        }

        private fun checkFile(folder: File, file: BundleFile) {
            val path = File(folder, file.name)
            if (!isInside(folder, file.name)) throw AdapterException("$folder/$ADAPTER names '${file.name}', which lies outside; do not use this adapter")
            if (!path.isFile) throw AdapterException("$path is missing; $HINT")
            if (path.length() != file.bytes || hashOf(path) != file.sha256) throw AdapterException("$path was changed; $HINT")
        }

        /** Name the file in the error of one that is damaged or cannot be read. */
        private inline fun <T> reading(path: File, act: () -> T): T = try {
            act()
        } catch (error: JsonException) {
            throw AdapterException("$path is damaged (${error.message}); $HINT", error)
        } catch (error: IOException) {
            throw AdapterException("$path cannot be read (${error.message}); $HINT", error)
        }
    }
}
