"""The TFLite backend: a quantized checkpoint becomes a `.tflite` for LiteRT."""
