package gemma.edge

import java.security.MessageDigest

/** A SHA-256 in hexadecimal of the bytes that [fill] gives to the digest. */
internal fun sha256(fill: MessageDigest.() -> Unit): String =
    MessageDigest.getInstance("SHA-256").apply(fill).digest().joinToString("") { "%02x".format(it) }
