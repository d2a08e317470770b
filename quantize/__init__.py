"""From float weights to the integers that every backend shares."""

from gemma_edge.public import callable_package

callable_package(__name__)
