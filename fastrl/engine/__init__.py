"""Samplers of completions. `hf` is the Hugging Face model itself and the default on a CPU."""
