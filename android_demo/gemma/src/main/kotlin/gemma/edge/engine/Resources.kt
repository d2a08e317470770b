package gemma.edge.engine

/** Resources that are closed together, in the reverse order of their creation. */
@EngineApi
public class Resources : AutoCloseable {
    private val open = ArrayList<AutoCloseable>()

    /** The resource itself. */
    public fun <T : AutoCloseable> add(resource: T): T = resource.also { open.add(it) }

    override fun close(): Unit = open.asReversed().forEach { it.close() }
}
