package gemma.edge

/** What this library throws for what it cannot use. The message is one line: what was found, what is allowed, the way out. */
public sealed class GemmaException(message: String, cause: Throwable? = null) : RuntimeException(message, cause)

/** The folder is no bundle, was damaged or changed, or is of another schema version: import or export it again. */
public class BundleException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The bundle is intact and needs something that this library cannot do: another backend, tokenizer or chat template. */
public class UnsupportedException(message: String) : GemmaException(message)

/** A saved state that is damaged, or of another bundle or backend: feed its text again. */
public class StateException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** A prompt, token or setting that cannot be used. */
public class InputException(message: String) : GemmaException(message)

/**
 * The device has too little free memory, found before anything was loaded.
 *
 * @property neededBytes what the bundle's plan says will be resident while it generates.
 * @property availableBytes what the system could give without killing other apps, at that moment.
 */
public class NotEnoughMemoryException(
    public val neededBytes: Long,
    public val availableBytes: Long,
    message: String,
) : GemmaException(message)
