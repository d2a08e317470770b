"""ONNX bundles for Qualcomm's NPU: what finds the NPU or the library that emulates it, and the engine."""
