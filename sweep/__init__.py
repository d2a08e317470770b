"""`gemma-sweep`: many exports of one model, measured, and the best of them under constraints."""

from gemma_edge.public import callable_package

callable_package(__name__)
