"""Hugging Face models: loading, refusing, packing, and the roles that they play in a run."""
