package gemma.edge.app.views

import android.view.View
import android.view.ViewGroup
import androidx.recyclerview.widget.RecyclerView

/**
 * Shows rows of type [T], each in views of type [B].
 *
 * @param inflate makes the views of a row below a parent.
 * @param rootOf the outermost of these views.
 * @param bind puts a row into its views.
 */
class RowAdapter<T, B>(
    private val inflate: (ViewGroup) -> B,
    private val rootOf: (B) -> View,
    private val bind: B.(T) -> Unit,
) : RecyclerView.Adapter<RowAdapter.Holder<B>>() {
    private var rows: List<T> = emptyList()

    class Holder<B>(val views: B, root: View) : RecyclerView.ViewHolder(root)

    fun show(rows: List<T>) {
        this.rows = rows
        notifyDataSetChanged()
    }

    override fun getItemCount() = rows.size

    override fun onCreateViewHolder(parent: ViewGroup, viewType: Int) = inflate(parent).let { Holder(it, rootOf(it)) }

    override fun onBindViewHolder(holder: Holder<B>, position: Int): Unit = holder.views.bind(rows[position])
}
