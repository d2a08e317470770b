"""A LoRA beside a bundle: its factors, the graphs that take them, and their gate."""
