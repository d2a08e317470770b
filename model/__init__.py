"""The Gemma 2 decoder in torch: no quantization, no backend."""
