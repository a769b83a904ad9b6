"""Which prompts, and how many completions each. One file per allocation; a new one is that file and one line here."""

from fastrl.allocation.apo_filter import APOFilter
from fastrl.allocation.sgpo import SGPO
from fastrl.allocation.uniform import Uniform

ALLOCATORS = {"uniform": Uniform, "sgpo": SGPO, "apo_filter": APOFilter}
