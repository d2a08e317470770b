"""The decoder in torch: no quantization, no backend."""
