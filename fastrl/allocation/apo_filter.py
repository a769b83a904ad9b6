"""The filter of A*-PO: problems that the model never solved in the profile are left out."""

from dataclasses import dataclass

from fastrl.allocation.uniform import Uniform
from fastrl.base.setting import setting
from fastrl.base.types import Problem


@dataclass(kw_only=True)
class APOFilter(Uniform):
    """Uniform over the problems with a pass rate above 0 (arXiv:2505.20686).

    An optimal value of 0 says that no completion is worth more than any other. At N = 8 a problem of true pass rate 0.1
    is left out with probability 0.43.
    """

    group_size: int = setting(1, "[1, 1e5]", known_as="num_generations")  # completions per problem

    needs_profile = True

    def arrange(self) -> None:
        if not any(map(solved, self.problems)):
            raise ValueError(
                f"allocation apo_filter: none of {len(self.problems)} problems was solved in the profile; take easier "
                "ones, more --num-profile-completions, or --allocation uniform"
            )

    def schedule(self, epoch: int) -> list[tuple[Problem, int]]:
        return [(problem, size) for problem, size in super().schedule(epoch) if solved(problem)]


def solved(problem: Problem) -> bool:
    """Whether any completion of its profile was right."""
    assert problem.profile_right is not None, f"{problem.id} has no profile"
    return bool(problem.profile_right.any())
