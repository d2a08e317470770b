"""The ONNX Runtime backend: seams in ONNX operators, the weights file, the graphs over it, and checks of what they hold."""
