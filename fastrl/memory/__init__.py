"""How many bytes a run needs and has. Knows no run."""
