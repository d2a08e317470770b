"""Gemma in GGUF files, as llama.cpp reads them: one file, or the parts of a split one."""
