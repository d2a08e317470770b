"""Integers fitted to what the layers see: calibration text, GPTQ, AWQ and the refit of norms."""
