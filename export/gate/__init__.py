"""The gate: a finished bundle is compared with the original, and published only within the limits."""
