"""From a quantized checkpoint to a verified bundle."""

from gemma_edge.public import callable_package

callable_package(__name__)
