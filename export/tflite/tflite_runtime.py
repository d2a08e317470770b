"""The backend tflite-runtime: the same model for the interpreter of 2023, whose last release is 2.14.

It multiplies by int8 matrices with one scale each, and gives zeros without a word where there are more (LiteRT's per channel).
So the matrices' scales are 1 here, and those of the channels are multiplied afterwards, which is the same. Its signatures copy
what comes in and goes out, so the caches are variables inside the model.
"""

from __future__ import annotations

from functools import partial

from gemma_edge.export.tflite import backend
from gemma_edge.export.tflite.packing import TFLITE_RUNTIME

FILE = "model_2_14.tflite"
lower = partial(
    backend.lower,
    variant=backend.Variant(FILE, TFLITE_RUNTIME, variables=True, needs={"min_tflite_runtime": "2.14"}),
)
