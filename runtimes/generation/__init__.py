"""From logits to text: sampling, sessions, speculation, constrained answers."""
