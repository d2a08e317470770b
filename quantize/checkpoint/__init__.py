"""The quantized checkpoint: a Hugging Face folder that is read and written slice by slice."""
