"""From a quantized checkpoint to a verified bundle."""
