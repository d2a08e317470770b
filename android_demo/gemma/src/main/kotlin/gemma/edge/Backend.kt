package gemma.edge

import gemma.edge.engine.EngineApi

/**
 * One backend of a bundle: files that one library for inference runs.
 *
 * @property name of the backend, as in `gemma-export --backend`.
 * @property cache geometry of its KV cache.
 * @property plan estimate of the memory that it needs.
 * @property files what it is made of.
 * @property program the file that its engine loads.
 * @property signatures functions of a TFLite model; empty for the other backends.
 * @property identity hash of all that a saved state depends on, as the exporter computed it.
 * @property accelerator what its files were made for: `cpu`, `gpu`, or what this library cannot use.
 */
public class Backend internal constructor(
    public val name: String,
    public val cache: CacheGeometry,
    public val plan: MemoryPlan,
    public val files: List<BundleFile>,
    @property:EngineApi public val program: String,
    @property:EngineApi public val signatures: List<Signature>,
    @property:EngineApi public val identity: String,
    public val accelerator: String,
) {
    /** Bytes of all its files. */
    public val bytes: Long get() = files.sumOf { it.bytes }

    /** Bytes of the weights, which a token reads once. */
    internal val weightBytes: Long get() = files.maxOf { it.bytes }
}

/**
 * What the exporter's plan says of the memory that a backend needs.
 *
 * @property weightsBytes bytes of the weights.
 * @property kvBytes bytes of the KV cache.
 * @property residentBytes estimate of what is resident while the model generates.
 */
public class MemoryPlan internal constructor(public val weightsBytes: Long, public val kvBytes: Long, public val residentBytes: Long)

/**
 * A function of a TFLite model, for chunks of one size. `Signature` in bundle/signature.py has the same fields.
 *
 * @property name of the function.
 * @property prefills whether it only fills the cache; otherwise it returns the logits of each of its tokens.
 * @property tokens in one call.
 * @property longest length of the longest text that it computes correctly; null for any length.
 */
@EngineApi
public class Signature(public val name: String, public val prefills: Boolean, public val tokens: Int, public val longest: Int?)

/**
 * The KV cache of one layer, in tokens.
 *
 * @property window keys that a query may see, its own included.
 * @property slots rows allocated.
 * @property pinned rows at the beginning that the first tokens keep; the others are used again and again.
 */
public data class LayerCache(public val window: Int, public val slots: Int, public val pinned: Int)

/**
 * The KV cache of the whole model: fixed when the bundle is made, whatever is generated.
 *
 * @property context tokens that the model can look back on; beyond it the oldest fall out.
 * @property prefillChunk most tokens in one forward call.
 * @property kvHeads key and value heads of a layer.
 * @property headDim elements of a head.
 * @property int8 whether elements are int8 codes, else float32.
 * @property layers the cache of each layer.
 */
public class CacheGeometry internal constructor(
    public val context: Int,
    public val prefillChunk: Int,
    public val kvHeads: Int,
    public val headDim: Int,
    public val int8: Boolean,
    public val layers: List<LayerCache>,
) {
    /** The largest number of tokens at the beginning of a text that the model can go on seeing beyond the context. */
    public val pinned: Int get() = layers.maxOf { it.pinned }

    /** Bytes of all K and V buffers. */
    public val bytes: Long get() = 2L * kvHeads * headDim * layers.sumOf { it.slots.toLong() } * elementBytes

    /** Tokens back that a cache can depend on: a layer's oldest key saw the window of the layer below, and so on. */
    internal val reach: Int get() = 1 + layers.sumOf { it.window - 1 }

    /** Bytes of the keys and values that a token sees at a depth of so many tokens. */
    internal fun bytesSeen(depth: Int): Long = layers.sumOf { minOf(it.window, depth).toLong() } * 2 * kvHeads * headDim * elementBytes

    private val elementBytes get() = if (int8) 1 else 4

    internal companion object {
        private val DTYPES = mapOf("int8" to true, "float32" to false)
        private const val LOCAL = "sliding_attention"

        /** Slots that only make their number a multiple of 64, for a GPU. */
        private const val MAX_ROUNDING = 63

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
            val pinned = layers.maxOf { if ("pinned" in it) it["pinned"].int(0..MAX_PINNED) else 0 }
            // a buffer's bytes are an Int
            val maxSlots = Int.MAX_VALUE / (Float.SIZE_BYTES * kvHeads * headDim)
            val read = layers.zip(kinds) { layer, kind ->
                val window = layer["window"].equalTo(if (kind.string == LOCAL) local else context)
                val kept = if (kind.string == LOCAL) 0 else pinned
                if ("pinned" in layer || kept > 0) layer["pinned"].equalTo(kept)
                val least = kept + window + chunk - 1
                LayerCache(window, layer["slots"].int(least..minOf(maxSlots, least + chunk - 1 + MAX_ROUNDING)), kept)
            }
            return CacheGeometry(context, chunk, kvHeads, headDim, int8, read)
        }
    }
}
