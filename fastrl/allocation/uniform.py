"""Every problem once per epoch in random order, each with the same number of completions."""

from dataclasses import dataclass

from fastrl.allocation.base import Allocation
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Problem


@dataclass(kw_only=True)
class Uniform(Allocation):
    group_size: int = setting(8, "[1, 1e5]", known_as="num_generations")  # completions per problem

    def __post_init__(self):
        check_bounds(self, "allocation.")

    @property
    def min_group_size(self) -> int:
        return self.group_size

    def schedule(self, epoch: int) -> list[tuple[Problem, int]]:
        return [(problem, self.group_size) for problem in self.permutation(epoch)]
