"""One training step, in order."""
