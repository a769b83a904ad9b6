"""When a run evaluates, saves, shows something, and ends."""

from dataclasses import dataclass

from fastrl.base.types import Problem
from fastrl.engine.base import Sampling


@dataclass(kw_only=True)
class Schedule:
    """When the run does what, in steps; 0 = never."""

    steps: int
    max_minutes: float
    eval_every: int
    stop_at_accuracy: float  # end the run when avg@k of the first evaluation set reaches it
    stop_below_accuracy: float  # or when it is below that
    stop_on_collapse: bool  # end the run at the first warning of fastrl.watch.health
    save_every: int
    keep: int
    sample_every: int
    rollouts_every: int

    def judge(self, accuracy: float) -> str:
        if 0 < self.stop_at_accuracy <= accuracy:
            return "target"
        return "collapsed" if accuracy < self.stop_below_accuracy else ""


@dataclass(kw_only=True)
class EvalSet:
    name: str
    problems: list[Problem]
    k: int
    sampling: Sampling
