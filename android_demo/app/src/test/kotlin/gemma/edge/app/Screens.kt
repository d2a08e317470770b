package gemma.edge.app

import android.app.Activity
import android.graphics.Bitmap
import android.graphics.Canvas
import android.os.Looper
import android.widget.TextView
import java.io.File
import org.robolectric.Shadows.shadowOf

/** The bundle that the app brings along, outside of it. */
internal val demoBundle = File(System.getProperty("gemma.demo.bundle")!!)

private const val PATIENCE_NS = 120_000_000_000L // nothing here takes a second on a machine that is not busy

/** Let the main thread run until something is so. */
internal fun waitUntil(what: String, isSo: () -> Boolean) {
    val end = System.nanoTime() + PATIENCE_NS
    while (true) {
        shadowOf(Looper.getMainLooper()).idle()
        if (isSo()) return
        check(System.nanoTime() < end) { "still not so: $what" }
        Thread.sleep(5)
    }
}

internal fun Activity.text(id: Int): String = findViewById<TextView>(id).text.toString()

internal fun Activity.type(id: Int, text: String) {
    findViewById<TextView>(id).text = text
}

internal fun Activity.press(id: Int) {
    check(findViewById<android.view.View>(id).performClick()) { "nothing listens to it" }
    shadowOf(Looper.getMainLooper()).idle()
}

/** What the screen shows, as docs/android/NAME.png has it. */
internal fun Activity.screenshot(name: String) {
    shadowOf(Looper.getMainLooper()).idle()
    val view = window.decorView
    val bitmap = Bitmap.createBitmap(view.width, view.height, Bitmap.Config.ARGB_8888)
    view.draw(Canvas(bitmap))
    File(System.getProperty("gemma.screenshots"), "$name.png").outputStream().use { bitmap.compress(Bitmap.CompressFormat.PNG, 100, it) }
}
