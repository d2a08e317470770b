"""A backend that gemma-edge does not know: dequantized weights in one file, and a numpy engine. Registered by the tests."""

from gemma_edge.bundle.backends import BackendInfo, Package

INFO = BackendInfo(
    "toy",
    "support.toy_backend.engine:ToyEngine",
    "support.toy_backend.exporter:BACKEND",
    Package("numpy", "numpy"),
)
