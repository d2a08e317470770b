"""Run a bundle: no torch here."""
