"""Text: tokenizer, chat templates, windows, and the shipped texts. Imports no torch; needs only `bundle`."""
