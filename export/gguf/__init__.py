"""A quantized checkpoint as a GGUF file for llama.cpp, with the same integers."""
