"""Whether there is anything to learn from: steps in which no completion is told from another by its reward."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

CUT_OFF, OTHER = "truncated", "other"
# cause -> statuses of completions that it stands for, what is said of them, and what to do where it is the largest
CAUSES = {
    CUT_OFF: ((), "were cut off by --max-new-tokens {limit}", "raise --max-new-tokens, or look at what does not end"),
    "no answer": (
        ("no_box",),
        "had no answer where --reward looks for one",
        "see in rollouts/ how they end, and whether --instruction asks for the form that --reward reads",
    ),
    "wrong": (
        ("wrong", "unparsed", "too_long"),
        "were wrong",
        "take easier problems, a stronger model, or a reward that tells better from worse completions",
    ),
    "error": (("error",), "made a reward function raise", "the log has what was raised first; mend the function"),
    "lost": (
        ("soft_timeout", "hard_timeout", "died"),
        "got no grade in time",
        "take a lighter --reward, or see in rollouts/ what the grader chokes on",
    ),
    OTHER: (
        (),
        "got nothing from --reward",
        "see in rollouts/ what is sampled, and whether --reward tells better from worse completions",
    ),
}


@dataclass
class Signal:
    """Says once, after STEPS steps without any signal, that nothing can be learnt, why, and what to do.

    A step has a signal where a group has different rewards; for an objective that does not compare the completions of a
    group, where any two rewards so far are different. A run that ends before STEPS has `outcome` to say.
    """

    limit: int = 0  # max_new_tokens
    compares: bool = True  # whether the objective compares the completions of a group with each other
    found: bool = field(default=False, init=False)  # a signal
    steps: int = field(default=0, init=False)  # until then, as all below
    low: float | None = field(default=None, init=False)  # smallest and largest reward
    high: float | None = field(default=None, init=False)
    counts: dict[str, float] = field(default_factory=dict, init=False)  # completions, by cause and in "all"

    STEPS = 4

    def observe(self, table: Tensor, statuses: dict[str, float]) -> list[str]:
        """`step.metrics.rollout_table` of all ranks, and completions by status -> what is to be said now."""
        group, reward, _, cut_off = table.unbind(dim=1)
        if self.found or not len(table) or not reward.isfinite().all():
            return []
        low, high = reward.min().item(), reward.max().item()
        self.low = low if self.low is None else min(low, self.low)
        self.high = high if self.high is None else max(high, self.high)
        self.found = differs_within(group, reward) if self.compares else self.low < self.high
        self.steps += 1
        now = causes(statuses, len(table), cut_off.sum().item())
        self.counts = {name: self.counts.get(name, 0.0) + n for name, n in now.items()}
        return [f"warning: {self.outcome()}"] if self.steps == self.STEPS and not self.found else []

    def outcome(self) -> str:
        """A sentence where no step so far had a signal; empty where one had."""
        if self.found or self.low is None or self.high is None:
            return ""
        steps = f"the first {self.steps} steps" if self.steps > 1 else "the first step"
        if self.high <= 0:
            shares = {name: self.counts[name] / self.counts["all"] for name in CAUSES}
            largest = sorted(CAUSES, key=lambda name: -shares[name])
            said = [f"{100 * shares[name]:.0f} % {CAUSES[name][1]}" for name in largest if shares[name] >= 0.005]
            said = ", ".join(said).format(limit=self.limit)
            return f"nothing can be learnt: no completion earned anything in {steps}: {said}; {CAUSES[largest[0]][2]}"
        if self.low == self.high:
            return (
                f"nothing can be learnt: every completion earned {self.high:g} in {steps}; take harder problems, or a "
                "reward that tells better from worse completions"
            )
        return (
            f"nothing can be learnt: in {steps} all completions of a problem earned the same, {self.low:g} to "
            f"{self.high:g}; take problems that are solved neither always nor never, larger groups, or a higher "
            "--temperature"
        )

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("found", "steps", "low", "high")} | {"counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.found, self.steps, self.low, self.high = (state[name] for name in ("found", "steps", "low", "high"))
        self.counts = dict(state["counts"])


def differs_within(group: Tensor, reward: Tensor) -> bool:
    """Whether any group, by its number, has two different rewards."""
    _, index = group.unique(return_inverse=True)
    empty = reward.new_zeros(int(index.max()) + 1)
    low = empty.scatter_reduce(0, index, reward, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, reward, "amax", include_self=False)
    return bool(torch.any(low < high))


def causes(statuses: dict[str, float], completions: int, cut_off: float) -> dict[str, float]:
    """Completions of a step by cause; together they are all of them, though several verifiers may have judged each.

    Example: {"wrong": 6, "no_box": 2}, 10 completions, 6 cut off -> 6 truncated, 3 wrong, 1 no answer.
    """
    found = {name: sum(statuses.get(status, 0.0) for status in own) for name, (own, _, _) in CAUSES.items()}
    rest, judged = completions - cut_off, sum(found.values())
    scale = min(1.0, rest / judged) if judged else 0.0
    found = {name: n * scale for name, n in found.items()}
    found[CUT_OFF] = cut_off
    found[OTHER] = completions - sum(n for name, n in found.items() if name != OTHER)
    return found | {"all": float(completions)}
