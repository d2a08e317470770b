"""A vocabulary with fewer tokens: which are kept, the tokenizer that knows only them, and the model with their rows alone."""
