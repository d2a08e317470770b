"""From float weights to the integers that every backend shares."""
