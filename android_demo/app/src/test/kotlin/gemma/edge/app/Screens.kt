package gemma.edge.app

import android.app.Activity
import android.app.Application
import android.graphics.Bitmap
import android.graphics.Canvas
import android.os.Looper
import android.widget.TextView
import java.io.File
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.launch
import org.robolectric.Shadows.shadowOf

/** The bundle that comes with the app, as a folder of this machine. */
internal val demoBundle = File(System.getProperty("gemma.demo.bundle")!!)

/** How long a test waits. On a machine that is not busy, everything here takes less than a second. */
private const val PATIENCE_NS = 120_000_000_000L

/** Run the main thread until [condition] is true. */
internal fun waitUntil(what: String, condition: () -> Boolean) {
    val end = System.nanoTime() + PATIENCE_NS
    while (true) {
        shadowOf(Looper.getMainLooper()).idle()
        if (condition()) return
        check(System.nanoTime() < end) { "still waiting for: $what" }
        Thread.sleep(5)
    }
}

/** Close the open model. Whoever works with it ends that on the main thread, which therefore goes on. */
internal fun Application.closeModel() {
    val closing = MainScope().launch { engine.close() }
    waitUntil("the model is closed") { closing.isCompleted }
}

internal fun Activity.text(id: Int): String = findViewById<TextView>(id).text.toString()

internal fun Activity.type(id: Int, text: String) {
    findViewById<TextView>(id).text = text
}

internal fun Activity.press(id: Int) {
    check(findViewById<android.view.View>(id).performClick()) { "the button has no listener" }
    shadowOf(Looper.getMainLooper()).idle()
}

/** Write what the screen shows to NAME.png; docs/android has these pictures. */
internal fun Activity.screenshot(name: String) {
    shadowOf(Looper.getMainLooper()).idle()
    val view = window.decorView
    val bitmap = Bitmap.createBitmap(view.width, view.height, Bitmap.Config.ARGB_8888)
    view.draw(Canvas(bitmap))
    File(System.getProperty("gemma.screenshots"), "$name.png").outputStream().use { bitmap.compress(Bitmap.CompressFormat.PNG, 100, it) }
}
