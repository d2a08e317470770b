"""Functions that a model may call: how they are offered, how calls are written, and how they are read back."""
