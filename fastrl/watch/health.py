"""Signs that a policy collapses or games its reward, each said once, in a sentence with its evidence and a flag."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fastrl.weights.guard import spread


@dataclass
class Health:
    """Watches the metrics of training steps, the same on all ranks.

    A step whose number is not finite, or that has none, neither adds to a streak nor ends it.
    """

    entropy_base: float | None = field(default=None, init=False)  # its exponential mean after BASE_STEPS steps, nats
    entropy_steps: int = field(default=0, init=False)  # that are in it
    streaks: dict[str, int] = field(default_factory=dict, init=False)  # steps in a row, by sign
    rewards: list[float] = field(default_factory=list, init=False)  # of the last WINDOW steps, oldest first
    raised: list[str] = field(default_factory=list, init=False)  # signs that have been said

    BASE_STEPS, BASE_WEIGHT = 10, 0.2
    ENTROPY_FRACTION, ENTROPY_STEPS = 0.1, 20
    ONE_TOKEN, TRUNCATED, STEPS = 0.5, 0.5, 5  # fractions of completions; in that many steps in a row
    WINDOW, FEWEST, SIGMAS = 128, 64, 6.0
    LEAST_SIGMA = 0.02  # of a mean reward; where it has hardly moved, every move is many of its own

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Metrics of a step -> sentences about what has begun with it."""
        signs = {
            "entropy": self.entropy(metrics["entropy"]),
            "one token": self.lasting(
                "one token",
                metrics["completions/one_token_frac"],
                self.ONE_TOKEN,
                lambda value: (
                    f"{value:.0%} of the completions repeat a single token in at least 80 % of their positions; look "
                    "at the rollouts, resume from before it with a lower --lr, or hold the policy to the reference by "
                    "--kl 0.001"
                ),
            ),
            "truncated": self.lasting(
                "truncated",
                metrics["completions/clipped_ratio"],
                self.TRUNCATED,
                lambda value: (
                    f"{value:.0%} of the completions are cut off by the length limit and earn nothing; "
                    "raise --max-new-tokens, or grade them with --grade-truncated"
                ),
            ),
            "reward": self.reward(metrics["reward"]),
        }
        found = [(name, text) for name, text in signs.items() if text and name not in self.raised]
        self.raised += [name for name, _ in found]
        return [f"warning: {text}" for _, text in found]

    def entropy(self, value: float) -> str:
        if not math.isfinite(value):
            return ""
        if self.entropy_steps < self.BASE_STEPS:
            mean = value if self.entropy_base is None else self.entropy_base
            self.entropy_base = mean + self.BASE_WEIGHT * (value - mean)
            self.entropy_steps += 1
            return ""
        assert self.entropy_base is not None  # BASE_STEPS > 0
        low = value < self.ENTROPY_FRACTION * self.entropy_base
        if not self.streak("entropy", low, self.ENTROPY_STEPS):
            return ""
        return (
            f"the entropy was below a tenth of its first {self.entropy_base:.3g} nats in {self.ENTROPY_STEPS} steps in "
            f"a row and is now {value:.3g}: the policy hardly tries anything new; lower --lr, or add --entropy 0.001"
        )

    def lasting(self, name: str, value: float, limit: float, text: Callable[[float], str]) -> str:
        if not math.isfinite(value):
            return ""
        above = value >= limit if name == "one token" else value > limit
        return f"in {self.STEPS} steps in a row {text(value)}" if self.streak(name, above, self.STEPS) else ""

    def reward(self, value: float) -> str:
        if not math.isfinite(value):
            return ""
        past, self.rewards = self.rewards, [*self.rewards, value][-self.WINDOW :]
        if len(past) < self.FEWEST:
            return ""
        mean, sigma = spread(past)
        if value <= mean + self.SIGMAS * max(sigma, self.LEAST_SIGMA):
            return ""
        return (
            f"the reward jumped to {value:.3g} from {mean:.3g} on average over {len(past)} steps, more than "
            f"{self.SIGMAS:g} standard deviations ({sigma:.2g}): a reward that is gamed looks like this; read the "
            "rollouts (--rollouts-every 1) before trusting --reward"
        )

    def streak(self, name: str, holds: bool, steps: int) -> bool:
        self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        return self.streaks[name] >= steps

    def state_dict(self) -> dict:
        return {
            "entropy_base": self.entropy_base,
            "entropy_steps": self.entropy_steps,
            "streaks": dict(self.streaks),
            "rewards": self.rewards,
            "raised": list(self.raised),
        }

    def load_state_dict(self, state: dict) -> None:
        self.entropy_base, self.entropy_steps = state["entropy_base"], state["entropy_steps"]
        self.streaks, self.rewards, self.raised = dict(state["streaks"]), list(state["rewards"]), list(state["raised"])
