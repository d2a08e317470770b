"""Runs bundles: engines, generation and the server. Only the executorch engine imports torch."""
