package gemma.edge

/**
 * The error that this library throws when it cannot use its input, a bundle or the device. The message is one line that says what is
 * wrong, what is allowed, and what to do.
 */
public sealed class GemmaException(message: String, cause: Throwable? = null) : RuntimeException(message, cause)

/** The folder is not a bundle, was damaged or changed, or has another schema version. Import or export the bundle again. */
public class BundleException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The bundle is intact but needs another backend, tokenizer or chat template than this library has. */
public class UnsupportedException(message: String) : GemmaException(message)

/** A saved state is damaged or belongs to another bundle or backend. Feed the text again. */
public class StateException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The folder is not an adapter, was damaged or changed, or was made for another bundle. Import or make the adapter again. */
public class AdapterException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** A prompt, a token or a setting cannot be used. */
public class InputException(message: String) : GemmaException(message)

/**
 * The device has too little free memory for the bundle. It is thrown before anything is loaded.
 *
 * @property neededBytes memory that will be resident while the model generates, according to the bundle's plan.
 * @property availableBytes memory that the system could give at that moment without killing other apps.
 */
public class NotEnoughMemoryException(
    public val neededBytes: Long,
    public val availableBytes: Long,
    message: String,
) : GemmaException(message)
