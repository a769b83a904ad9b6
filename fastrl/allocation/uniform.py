"""Every problem once per epoch in random order, each with the same number of completions."""

from dataclasses import dataclass

from fastrl.allocation.base import Allocation
from fastrl.types import Problem


@dataclass(kw_only=True)
class Uniform(Allocation):
    group_size: int = 8  # completions per problem

    def __post_init__(self):
        if self.group_size < 1:
            raise ValueError(f"--allocation.group-size must be at least 1, got {self.group_size}")

    @property
    def min_group_size(self) -> int:
        return self.group_size

    def schedule(self, epoch: int) -> list[tuple[Problem, int]]:
        return [(problem, self.group_size) for problem in self.permutation(epoch)]
