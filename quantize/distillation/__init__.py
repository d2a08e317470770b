"""Scales and norms trained on the original's logits."""
