"""Every flag of a run: what it is, how it is read, what it means for memory."""
