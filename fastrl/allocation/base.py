"""Which problems are sampled, and how many completions each: an order per epoch and a position in it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastrl.types import Problem, RolloutGroup


@dataclass(kw_only=True)
class Allocation(ABC):
    """The order is a function of (problems, seed, epoch), so the only state is how far it has been followed."""

    problems: list[Problem] = field(default_factory=list, init=False, repr=False)
    seed: int = field(default=0, init=False)
    epoch: int = field(default=0, init=False)
    position: int = field(default=0, init=False)  # entries of this epoch's schedule already taken

    needs_profile = False

    @property
    @abstractmethod
    def min_group_size(self) -> int:
        """The smallest group this allocation may ask for."""

    @abstractmethod
    def schedule(self, epoch: int) -> list[tuple[Problem, int]]:
        """All (problem, group_size) of an epoch, in training order."""

    def budget(self, problems_per_step: int) -> int:
        """Completions of one step."""
        return problems_per_step * self.min_group_size

    def start(self, problems: Sequence[Problem], seed: int) -> None:
        self.problems, self.seed = list(problems), seed
        self.current = self.schedule(self.epoch)

    def take(self, budget: int) -> list[tuple[Problem, int]]:
        """The next whole groups with at least `budget` completions together, across epochs where need be."""
        plan, completions = [], 0
        while completions < budget:
            if self.position == len(self.current):
                self.epoch, self.position = self.epoch + 1, 0
                self.current = self.schedule(self.epoch)
            plan.append(self.current[self.position])
            completions += plan[-1][1]
            self.position += 1
        return plan

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Called with every step's scored groups; an allocation that adapts overrides it."""
        return None

    def permutation(self, epoch: int) -> list[Problem]:
        """All problems, shuffled by (seed, epoch)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return [self.problems[i] for i in torch.randperm(len(self.problems), generator=generator).tolist()]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.current = self.schedule(self.epoch)
