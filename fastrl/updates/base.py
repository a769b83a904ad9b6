"""What an update rule is: how one batch becomes a change of the parameters."""

from collections.abc import Callable, Sequence
from typing import Protocol

Accumulate = Callable[[], dict[str, float]]


class UpdateRule(Protocol):
    """A dataclass; its fields are its configuration, fields with init=False its state.

    backward_passes: full gradients it takes per minibatch, now (a rule whose gate has closed takes one).
    copies: of the shard of weights that it holds during an update; holds_state: and one of the optimizer's state.
    per_coordinate: whether it reads how single coordinates move.
    """

    backward_passes: int
    copies: int
    holds_state: bool
    per_coordinate: bool

    def update(self, policy, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        """Change this rank's shard by the gradients that the closures leave in the gradient buffer; return metrics.

        Among the metrics: what `policy.optimizer_step()` returned last, and num_backward_passes.

        An accumulate() zeroes the gradients, runs its minibatch at the current weights and returns its metrics. It may
        be called any number of times and never samples. The rule calls `policy.optimizer_step()` after each gradient it
        uses and `policy.publish()` after it has moved the shard itself: by `policy.assign()`, or by operations of
        fastrl.weights.moves on `policy.master` and `policy.low`; `policy.publish(written=True)` if it has moved
        `policy.weights_bf16`, where that is not None, along with it. `policy.values()` is a copy of the shard.
        """

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def one_pass(policy, minibatches: Sequence[Accumulate]) -> dict[str, float]:
    """One optimizer step per minibatch; returns the metrics averaged over minibatches and the number of steps."""
    totals: dict[str, float] = {}
    for accumulate in minibatches:
        for name, value in {**accumulate(), **policy.optimizer_step()}.items():
            totals[name] = totals.get(name, 0.0) + value
    metrics = {name: total if name == "skipped" else total / len(minibatches) for name, total in totals.items()}
    return {**metrics, "num_backward_passes": float(len(minibatches))}
