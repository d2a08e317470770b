package gemma.edge.app.views

import android.content.Context
import android.content.Intent
import android.widget.EditText
import com.google.android.material.dialog.MaterialAlertDialogBuilder
import gemma.edge.app.R

/** Ask before something is deleted for good. */
fun Context.confirmDelete(name: String, delete: () -> Unit) {
    MaterialAlertDialogBuilder(this)
        .setMessage(getString(R.string.confirm_delete, name))
        .setPositiveButton(R.string.delete_it) { _, _ -> delete() }
        .setNegativeButton(R.string.cancel, null)
        .show()
}

/** Ask for a line of text. */
fun Context.askText(title: String, text: String, use: (String) -> Unit) {
    val field = EditText(this).apply { setText(text); setSingleLine(); contentDescription = title }
    MaterialAlertDialogBuilder(this)
        .setTitle(title)
        .setView(field)
        .setPositiveButton(R.string.save) { _, _ -> use(field.text.toString()) }
        .setNegativeButton(R.string.cancel, null)
        .show()
}

/** Let the user choose one of several texts. */
fun Context.askChoice(title: String, choices: List<String>, chosen: Int, use: (Int) -> Unit) {
    MaterialAlertDialogBuilder(this)
        .setTitle(title)
        .setSingleChoiceItems(choices.toTypedArray(), chosen) { dialog, index -> dialog.dismiss(); use(index) }
        .setNegativeButton(R.string.cancel, null)
        .show()
}

/** Hand a text over to an app that the user chooses. */
fun Context.share(text: String) {
    val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text)
    startActivity(Intent.createChooser(send, null))
}
