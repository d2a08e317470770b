"""One engine per backend behind the same `Runtime`."""
