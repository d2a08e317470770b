package gemma.edge.app

import android.view.Gravity
import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.LinearLayout
import android.widget.TextView
import androidx.recyclerview.widget.DiffUtil
import androidx.recyclerview.widget.ListAdapter
import androidx.recyclerview.widget.RecyclerView
import com.google.android.material.card.MaterialCardView
import com.google.android.material.color.MaterialColors

/** Shows messages: the user's at the end of the line, the model's at its start, numbers under answers. */
class MessageAdapter : ListAdapter<ChatMessage, MessageAdapter.Holder>(Difference) {
    /** Read out as the one who speaks. */
    var model: String = ""

    class Holder(view: View) : RecyclerView.ViewHolder(view) {
        val card: MaterialCardView = view.findViewById(R.id.card)
        val text: TextView = view.findViewById(R.id.text)
        val stats: TextView = view.findViewById(R.id.stats)
    }

    override fun onCreateViewHolder(parent: ViewGroup, viewType: Int) =
        Holder(LayoutInflater.from(parent.context).inflate(R.layout.message, parent, false))

    override fun onBindViewHolder(holder: Holder, position: Int) {
        val message = getItem(position)
        val context = holder.itemView.context
        holder.text.text = message.text.ifEmpty { "…" }
        holder.text.contentDescription =
            if (message.byUser) context.getString(R.string.you_said, message.text) else context.getString(R.string.model_said, model, message.text)
        val background = if (message.byUser) com.google.android.material.R.attr.colorPrimaryContainer
        else com.google.android.material.R.attr.colorSurfaceContainerHighest
        holder.card.setCardBackgroundColor(MaterialColors.getColor(holder.card, background))
        (holder.card.layoutParams as LinearLayout.LayoutParams).gravity = if (message.byUser) Gravity.END else Gravity.START
        holder.stats.visibility = if (message.stats == null) View.GONE else View.VISIBLE
        message.stats?.let { holder.stats.text = context.getString(R.string.answer_stats, it.decodeTokensPerS, it.ttftMs) }
    }

    private object Difference : DiffUtil.ItemCallback<ChatMessage>() {
        // a message is only ever replaced by a longer one in the same place
        override fun areItemsTheSame(old: ChatMessage, new: ChatMessage) = old.byUser == new.byUser && new.text.startsWith(old.text)

        override fun areContentsTheSame(old: ChatMessage, new: ChatMessage) = old == new
    }
}
