package gemma.edge.app

import gemma.edge.GemmaException
import java.io.IOException

/**
 * Run [act] and return the message of an error that the user can do something about; null if there was none. Any other error is a
 * bug of the app, so it is not caught.
 */
internal inline fun failureOf(act: () -> Unit): String? = try {
    act()
    null
} catch (error: GemmaException) {
    error.message ?: error.toString()
} catch (error: IOException) {
    error.message ?: error.toString()
}
