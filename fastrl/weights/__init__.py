"""The flat weight buffer, this rank's shard of it, its optimizer, and the moves of update rules."""
