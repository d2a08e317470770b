package gemma.edge.litert

/**
 * The sizes in a LiteRT `TensorType.Layout`, null without one. Some releases of LiteRT give them as an `IntArray` and others as a list,
 * so they are read by the property's name: code that was compiled against the one does not find the other.
 */
internal fun sizesOf(layout: Any?): List<Int>? = when (val sizes = layout?.let { it.javaClass.getMethod("getDimensions").invoke(it) }) {
    is IntArray -> sizes.asList()
    is List<*> -> sizes.map { it as Int }
    else -> null
}
