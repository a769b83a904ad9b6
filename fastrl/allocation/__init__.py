"""Which prompts, and how many completions each. One file per allocation; a new one is that file and one line here."""

from fastrl.allocation.uniform import Uniform

ALLOCATORS = {"uniform": Uniform}
