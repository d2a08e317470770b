package gemma.edge.app.views

import android.view.Gravity
import android.view.LayoutInflater
import android.view.View
import android.view.ViewGroup
import android.widget.LinearLayout
import androidx.core.view.isVisible
import androidx.recyclerview.widget.DiffUtil
import androidx.recyclerview.widget.ListAdapter
import androidx.recyclerview.widget.RecyclerView
import com.google.android.material.color.MaterialColors
import gemma.edge.app.ChatMessage
import gemma.edge.app.R
import gemma.edge.app.databinding.MessageBinding

/**
 * Shows the user's messages at the end of the line and the model's at its start, with numbers below finished answers.
 *
 * @param onLongPress called with a message's view and place when the user presses it for long.
 */
class MessageAdapter(private val onLongPress: (View, Int) -> Unit) : ListAdapter<ChatMessage, MessageAdapter.Holder>(Difference) {
    /** The name by which TalkBack announces the model's messages. */
    var modelName: String = ""

    class Holder(val binding: MessageBinding) : RecyclerView.ViewHolder(binding.root)

    override fun onCreateViewHolder(parent: ViewGroup, viewType: Int) =
        Holder(MessageBinding.inflate(LayoutInflater.from(parent.context), parent, false))

    override fun onBindViewHolder(holder: Holder, position: Int): Unit = with(holder.binding) {
        val message = getItem(position)
        val context = root.context
        text.text = if (message.byUser) message.text else markdown(message.text.ifEmpty { "…" }).toSpannable()
        card.setOnLongClickListener { onLongPress(card, holder.bindingAdapterPosition).let { true } }
        text.contentDescription = if (message.byUser) context.getString(R.string.you_said, message.text)
        else context.getString(R.string.model_said, modelName, message.text)
        val background = if (message.byUser) com.google.android.material.R.attr.colorPrimaryContainer
        else com.google.android.material.R.attr.colorSurfaceContainerHighest
        card.setCardBackgroundColor(MaterialColors.getColor(card, background))
        (card.layoutParams as LinearLayout.LayoutParams).gravity = if (message.byUser) Gravity.END else Gravity.START
        stats.isVisible = message.stats != null
        message.stats?.let { stats.text = context.getString(R.string.answer_stats, it.decodeTokensPerS, it.ttftMs) }
    }

    private object Difference : DiffUtil.ItemCallback<ChatMessage>() {
        // a message is only ever replaced by a longer one in the same place
        override fun areItemsTheSame(old: ChatMessage, new: ChatMessage) = old.byUser == new.byUser && new.text.startsWith(old.text)

        override fun areContentsTheSame(old: ChatMessage, new: ChatMessage) = old == new
    }
}
