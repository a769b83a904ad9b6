"""The ordinary rule: one gradient, one optimizer step per minibatch."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.base.setting import check_bounds, setting
from fastrl.updates.base import Accumulate, Shard, UpdateRule, one_pass


@dataclass(kw_only=True)
class Single(UpdateRule):
    """theta <- theta - step(gradient), minibatch after minibatch, `epochs_per_batch` times over the batch."""

    epochs_per_batch: int = setting(1, "[1, 1e4]", known_as="num_iterations")  # passes over the completions of a step

    def __post_init__(self):
        check_bounds(self, "update.")

    @property
    def backward_passes(self) -> int:
        return self.epochs_per_batch

    def update(self, shard: Shard, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        passes = [one_pass(shard, minibatches) for _ in range(self.epochs_per_batch)]
        summed = ("skipped", "num_backward_passes")
        return passes[-1] | {name: sum(p[name] for p in passes) for name in summed}
