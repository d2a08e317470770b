"""Mixed precision: which weight gets how many bits under a budget."""
