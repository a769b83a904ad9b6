"""Which problems are sampled, and how many completions each: an order per epoch and a position in it."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastrl.base.types import CheckpointError, Problem, RolloutGroup


@dataclass(kw_only=True)
class Allocation(ABC):
    """The order is a function of (problems, seed, epoch), so the only state is how far it has been followed.

    needs_profile: whether it reads `problem.profile_right`.
    """

    problems: list[Problem] = field(default_factory=list, init=False, repr=False)
    seed: int = field(default=0, init=False)
    steps: int = field(default=0, init=False)  # that the present profile is for: the whole run, if it is never renewed
    epoch: int = field(default=0, init=False)
    position: int = field(default=0, init=False)  # entries of this epoch's schedule already taken

    needs_profile = False

    @property
    @abstractmethod
    def min_group_size(self) -> int:
        """The smallest group this allocation may ask for."""

    @property
    def max_group_size(self) -> int:
        """The largest group this allocation may ask for."""
        return self.min_group_size

    @abstractmethod
    def schedule(self, epoch: int) -> list[tuple[Problem, int]]:
        """All (problem, group_size) of an epoch, in training order."""

    def budget(self, problems_per_step: int) -> int:
        """Completions of one step."""
        return problems_per_step * self.min_group_size

    def start(self, problems: Sequence[Problem], seed: int, steps: int) -> None:
        """Raises ValueError when the profile leaves no problem to train on."""
        self.problems, self.seed, self.steps = list(problems), seed, steps
        self.arrange()
        self.current = self.schedule(self.epoch)

    def arrange(self) -> None:
        """Called before the first schedule and when the profile has changed; raises before it changes anything."""
        return None

    def profile_changed(self) -> None:
        """The profile has new values: the order is made anew. Raises ValueError like `start`, and changes nothing."""
        self.arrange()
        self.next_epoch()

    def next_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0
        self.current = self.schedule(self.epoch)

    def take(self, budget: int) -> list[tuple[Problem, int]]:
        """The next whole groups with at least `budget` completions together, across epochs where need be."""
        plan, completions = [], 0
        while completions < budget:
            if self.position == len(self.current):
                self.next_epoch()
            plan.append(self.current[self.position])
            completions += plan[-1][1]
            self.position += 1
        return plan

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Called with every step's scored groups; an allocation that adapts overrides it."""
        return None

    def permutation(self, epoch: int) -> list[Problem]:
        """All problems, shuffled by (seed, epoch)."""
        return self.shuffled(self.problems, epoch)

    def shuffled(self, problems: Sequence[Problem], epoch: int) -> list[Problem]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return [problems[i] for i in torch.randperm(len(problems), generator=generator).tolist()]

    def sizes(self) -> dict[str, int]:
        """Group size by problem id, as the present profile has it; a problem that is left out is absent."""
        return {problem.id: size for problem, size in self.schedule(self.epoch)}

    def outlook(self) -> str:
        """How many problems it keeps, and with how many completions each, as a line for a person."""
        sizes = Counter(self.sizes().values())
        groups = ", ".join(f"{count} x {size}" for size, count in sorted(sizes.items()))
        return f"{sizes.total()} of {len(self.problems)} problems by group size: {groups}"

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Raises CheckpointError when the position lies behind the epoch's end: the problems are others."""
        self.epoch, self.position = state["epoch"], state["position"]
        self.current = self.schedule(self.epoch)
        if not 0 <= self.position <= len(self.current):
            raise CheckpointError(
                f"the checkpoint is at group {self.position} of an epoch that has {len(self.current)}; its problems "
                "or its allocation were others"
            )
