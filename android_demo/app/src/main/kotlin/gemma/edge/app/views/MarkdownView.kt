package gemma.edge.app.views

import android.graphics.Typeface
import android.text.Spannable
import android.text.SpannableString
import android.text.style.BulletSpan
import android.text.style.RelativeSizeSpan
import android.text.style.StyleSpan
import android.text.style.TypefaceSpan

/** A styled text as a view takes it. */
fun StyledText.toSpannable(): Spannable = SpannableString(text).also { spannable ->
    for (part in parts) for (span in spansOf(part.style)) spannable.setSpan(span, part.start, part.end, Spannable.SPAN_EXCLUSIVE_EXCLUSIVE)
}

private fun spansOf(style: TextStyle): List<Any> = when (style) {
    TextStyle.BOLD -> listOf(StyleSpan(Typeface.BOLD))
    TextStyle.ITALIC -> listOf(StyleSpan(Typeface.ITALIC))
    TextStyle.CODE, TextStyle.CODE_BLOCK -> listOf(TypefaceSpan("monospace"))
    TextStyle.HEADING -> listOf(StyleSpan(Typeface.BOLD), RelativeSizeSpan(HEADING_SIZE))
    TextStyle.BULLET -> listOf(BulletSpan(BULLET_GAP))
}

private const val HEADING_SIZE = 1.2f
private const val BULLET_GAP = 16
