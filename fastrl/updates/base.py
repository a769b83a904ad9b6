"""What an update rule is: how one batch becomes a change of the parameters. A rule sees moves, never storage."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from fastrl.weights.moves import Extrapolation
from fastrl.weights.shard import Gradient

Pair = tuple[Tensor, Tensor]
Accumulate = Callable[[], dict[str, float]]


class Shard(Protocol):
    """This rank's part of the parameters, as a rule sees it: a point that gradients and moves lead elsewhere.

    Every method that changes the point also publishes it: the model and the engine have the new weights on every rank.
    Snapshots, displacements and gradients are vectors [P / ranks] like the shard, float32 (float64 for such a model);
    the rule may keep them and calculate with them. The moves return sums over all ranks, by name: `elements`,
    `before_sq` and `after_sq` (squared distance to the anchor before and after), and `extrapolate` more, see FlatStats.

    Example: anchor = shard.snapshot(); one_pass(shard, minibatches); shard.interpolate(anchor, 0.5)   # half the step
    """

    @property
    def lr(self) -> float: ...

    def snapshot(self) -> Tensor:
        """A copy of the point."""
        ...

    def restore(self, anchor: Tensor) -> None:
        """Go back to a snapshot."""

    def interpolate(self, anchor: Tensor, alpha: float) -> dict[str, float]:
        """Go to anchor + alpha (theta - anchor): exactly the anchor at 0, and nowhere at 1."""
        ...

    def extrapolate(
        self, anchor: Tensor, law: Extrapolation, *, grads: Pair | None = None, u0: Tensor | None = None
    ) -> dict[str, float]:
        """Go on from two steps as `law` says, by the gradients of both, or by the first step u0 = theta_1 - anchor."""
        ...

    def extrapolate_by_tensor(self, anchor: Tensor, law: Extrapolation, grads: Pair) -> dict[str, float]:
        """The same with one ratio for each tensor of the model."""
        ...

    def gradient(self, loss: float) -> Gradient:
        """The accumulated gradient, summed over ranks. Once after each accumulate(), with the loss that it returned."""
        ...

    def apply(self, gradient: Gradient) -> dict[str, float]:
        """One optimizer step -> grad_norm (before clipping, which changes `gradient`) and skipped (0 or 1).

        A step that the guard refuses changes nothing.
        """
        ...

    def optimizer_step(self, loss: float) -> dict[str, float]:
        """apply(gradient(loss))."""
        ...

    def optimizer_snapshot(self) -> dict[str, Tensor]:
        """A copy of the optimizer's state."""
        ...

    def optimizer_restore(self, state: dict[str, Tensor]) -> None: ...

    def scale_first_moment(self, factor: float) -> None: ...

    def inner_products(self, pairs: Sequence[Pair]) -> list[float]:
        """Pairs of vectors like the shard -> their inner products over all ranks."""
        ...


class UpdateRule(ABC):
    """A dataclass of one file; its fields are its configuration, fields with init=False its state.

    What is here are the answers of a rule that takes one gradient per minibatch and remembers nothing.
    """

    backward_passes = 1  # full gradients it takes per minibatch, now; one whose gate has closed takes one
    copies = 0  # vectors like the shard that it holds during an update, for the memory plan
    holds_state = False  # whether it holds a copy of the optimizer's state during an update
    keeps = 0  # vectors like the shard that it keeps from step to step
    per_coordinate = False  # whether it reads how single coordinates move; 8-bit moments are then refused

    @abstractmethod
    def update(self, shard: Shard, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        """Change the point by the gradients that the closures leave; return metrics.

        An accumulate() zeroes the gradients, runs its minibatch at the current weights and returns its metrics. It may
        be called any number of times and never samples. Among the metrics must be those that `one_pass` returns:
        grad_norm, skipped and num_backward_passes.
        """

    def start(self, shard: Shard) -> None:
        """Called once, before the first step and before a checkpoint is loaded: make the tensors that are kept."""
        return None

    def state_dict(self) -> dict:
        """What a resumed run needs, as JSON holds it: numbers, texts, lists."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None

    def state_tensors(self) -> dict[str, Tensor]:
        """Vectors like the shard that a resumed run needs, by name: finite; saved and cut among ranks like it."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        for name, own in self.state_tensors().items():
            own.copy_(tensors[name])


def check_state(rule: UpdateRule, like: Tensor) -> None:
    """Raise ValueError where a rule keeps what no checkpoint would have. like: a snapshot, or its length and dtype."""
    name, kept = type(rule).__name__, rule.state_tensors()
    try:
        json.dumps(rule.state_dict())
    except TypeError as error:
        raise ValueError(
            f"update rule {name}: state_dict() must be JSON, but {error}; return tensors from state_tensors()"
        ) from None
    for key, tensor in kept.items():
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(
                f"update rule {name}: state_tensors() has {key!r} {tensor.dtype} {tuple(tensor.shape)}, expected a "
                f"vector like the shard, {like.dtype} {tuple(like.shape)}; take it from shard.snapshot()"
            )
    if len(kept) != rule.keeps:
        raise ValueError(
            f"update rule {name}: keeps = {rule.keeps} (the memory plan counts it) but state_tensors() has {len(kept)} "
            "tensors; make them in start(), and say how many in keeps"
        )
    known = {id(tensor) for tensor in kept.values()}
    lost = [key for key, value in vars(rule).items() if isinstance(value, Tensor) and id(value) not in known]
    if lost:
        raise ValueError(
            f"update rule {name}: the tensor {lost[0]!r} is kept from step to step and would be in no checkpoint; "
            "return it from state_tensors(), or drop it at the end of update()"
        )


def one_pass(shard: Shard, minibatches: Sequence[Accumulate]) -> dict[str, float]:
    """One optimizer step per minibatch; returns the metrics averaged over minibatches and the number of steps."""
    totals: dict[str, float] = {}
    for accumulate in minibatches:
        metrics = accumulate()
        for name, value in {**metrics, **shard.optimizer_step(metrics["loss"])}.items():
            totals[name] = totals.get(name, 0.0) + value
    metrics = {name: total if name == "skipped" else total / len(minibatches) for name, total in totals.items()}
    return {**metrics, "num_backward_passes": float(len(minibatches))}
