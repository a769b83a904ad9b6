"""sGPO: completions go where the profile says that there is something to learn, easy problems first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fastrl.allocation.base import Allocation
from fastrl.base import ranks
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Problem, RolloutGroup


@dataclass(kw_only=True)
class SGPO(Allocation):
    """Sorted group policy optimization (arXiv:2606.08854), with the pass rates of the profile, s right of N.

        trivial     pass_rate > trivial_threshold                               never sampled
        unsolved    pass_rate = 0; a random unsolved_keep_frac of them          in every phase, with its group size
        learnable   group size = the largest of group_sizes <= 1 / pass_rate,   only in the phase of that size
                    at least the smallest

    One phase per group size, in order. A step samples whole groups up to a budget of completions, so that phases of
    small groups do not take small steps. The paper trains each phase to convergence and gives no length: here it has
    steps in proportion to its problems times their group size, or ends when the training reward no longer grows.

    estimator=beta has (s + 1) / (N + 2) for the pass rate, which is never 0: at N = 8 a problem of true pass rate 0.1
    goes unsolved with probability 0.43, and nine of ten such problems would be given up.
    """

    trivial_threshold: float = setting(0.75, "(0, 1]")  # pass rate; 7/8 and 8/8 are above it
    unsolved_keep_frac: float = setting(0.10, "[0, 1]")  # of the problems that were never solved
    group_sizes: tuple[int, ...] = setting((2, 4, 8), "[0, 1e5]")  # one phase each
    # steps by the work of a phase, or until rewards no longer grow
    phase_schedule: Literal["proportional", "patience"] = "proportional"
    patience: int = setting(20, "[1, 1e9]")  # steps without a higher training reward that end a phase
    # completions; 0 = problems_per_step times the largest group size
    num_rollouts_per_step: int = setting(0, "[0, 1e9]")
    estimator: Literal["frequency", "beta"] = "frequency"  # of the pass rate: s / N, or (s + 1) / (N + 2)

    phase: int = field(default=0, init=False)
    phase_steps: int = field(default=0, init=False)  # taken in this phase
    best_reward: float | None = field(default=None, init=False)  # mean of a step, in this phase
    waited: int = field(default=0, init=False)  # steps since then

    needs_profile = True

    def __post_init__(self):
        check_bounds(self, "allocation.")
        sizes = self.group_sizes
        if not sizes or min(sizes) < 2 or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"--allocation.group-sizes must be 2 or more, each larger than the last, got {sizes}")
        if self.num_rollouts_per_step and self.num_rollouts_per_step < max(sizes):
            raise ValueError(
                f"--allocation.num-rollouts-per-step must hold a group of {max(sizes)} (or be 0), "
                f"got {self.num_rollouts_per_step}"
            )

    @property
    def min_group_size(self) -> int:
        return min(self.group_sizes)

    @property
    def max_group_size(self) -> int:
        return max(self.group_sizes)

    def budget(self, problems_per_step: int) -> int:
        return self.num_rollouts_per_step or problems_per_step * self.max_group_size

    def pass_rate(self, problem: Problem) -> float:
        assert problem.profile_right is not None, f"{problem.id} has no profile"
        right, n = problem.profile_right.sum().item(), len(problem.profile_right)
        return (right + 1) / (n + 2) if self.estimator == "beta" else right / n

    def group_size(self, pass_rate: float) -> int:
        """The largest size not above 1 / pass_rate, at least the smallest; pass_rate in (0, 1]."""
        # 1 / (1 / 5) may round to below 5
        return max((s for s in self.group_sizes if s * pass_rate <= 1 + 1e-9), default=self.min_group_size)

    def arrange(self) -> None:
        rate = {p.id: self.pass_rate(p) for p in self.problems}
        learnable = [p for p in self.problems if 0 < rate[p.id] <= self.trivial_threshold]
        unsolved = [p for p in self.problems if rate[p.id] == 0]
        if not learnable:
            raise ValueError(
                f"allocation sgpo: of {len(self.problems)} problems {len(unsolved)} were never solved in the profile "
                f"and all others above --allocation.trivial-threshold {self.trivial_threshold:g}, so nothing is left "
                "to learn; take other problems, --allocation.estimator beta, or --allocation uniform"
            )
        clusters = {g: [p for p in learnable if self.group_size(rate[p.id]) == g] for g in self.group_sizes}
        self.num_unsolved = len(unsolved)
        kept = math.ceil(round(self.unsolved_keep_frac * len(unsolved), 9))  # 0.1 * 70 is above 7
        self.unsolved = self.shuffled(unsolved, -1)[:kept]
        self.clusters = {g: members for g, members in clusters.items() if members}
        self.phases = list(self.clusters)
        # rounding the ends and not the lengths keeps the sum
        weights = [g * len(members) for g, members in self.clusters.items()]
        ends = [round(self.steps * sum(weights[: k + 1]) / sum(weights)) for k in range(len(weights))]
        self.phase_lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def schedule(self, epoch: int) -> list[tuple[Problem, int]]:
        """The problems of the present phase and the unsolved ones that were kept."""
        size = self.phases[self.phase]
        return [(problem, size) for problem in self.shuffled(self.clusters[size] + self.unsolved, epoch)]

    def take(self, budget: int) -> list[tuple[Problem, int]]:
        while self.phase + 1 < len(self.phases) and self.phase_is_over():
            self.enter(self.phase + 1)
        self.phase_steps += 1
        return super().take(budget)

    def phase_is_over(self) -> bool:
        if self.phase_schedule == "patience":
            return self.waited >= self.patience
        return self.phase_steps >= self.phase_lengths[self.phase]

    def enter(self, phase: int) -> None:
        self.phase, self.phase_steps, self.best_reward, self.waited = phase, 0, None, 0
        self.next_epoch()

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        if self.phase_schedule != "patience":
            return
        rewards = [c.reward for g in groups for c in g.completions]
        total, count = ranks.all_sum_(torch.tensor([sum(rewards), len(rewards)], dtype=torch.float64)).tolist()
        reward = total / count
        if not math.isfinite(reward):
            return
        if self.best_reward is None or reward > self.best_reward:
            self.best_reward, self.waited = reward, 0
        else:
            self.waited += 1

    def profile_changed(self) -> None:
        """The curriculum begins anew, with what is easy now."""
        self.arrange()
        self.enter(0)

    def sizes(self) -> dict[str, int]:
        """0 for an unsolved problem that was kept: it has the size of every phase."""
        learnable = {p.id: g for g, members in self.clusters.items() for p in members}
        return learnable | {p.id: 0 for p in self.unsolved}

    def outlook(self) -> str:
        kept = sum(map(len, self.clusters.values()))
        parts = [f"{len(members)} x {g}" for g, members in self.clusters.items()]
        if self.phase_schedule == "proportional":
            parts = [f"{part} in {n} steps" for part, n in zip(parts, self.phase_lengths, strict=True)]
        trivial = len(self.problems) - kept - self.num_unsolved
        return (
            f"{kept} of {len(self.problems)} problems by group size, in phases: {', '.join(parts)}; "
            f"{len(self.unsolved)} of {self.num_unsolved} unsolved ones in every phase; {trivial} solved too often"
        )

    def state_dict(self) -> dict:
        own = ("phase", "phase_steps", "best_reward", "waited")
        return super().state_dict() | {name: getattr(self, name) for name in own}

    def load_state_dict(self, state: dict) -> None:
        self.arrange()
        self.phase, self.phase_steps = state["phase"], state["phase_steps"]
        self.best_reward, self.waited = state["best_reward"], state["waited"]
        super().load_state_dict(state)
