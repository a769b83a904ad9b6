"""Weights under training: one flat buffer, this rank's float32 shard of it, an optimizer and a guard over the shard."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl import ranks
from fastrl.flat import FlatParams
from fastrl.guard import Guard
from fastrl.optim import (
    OptimConfig,
    load_state_tensors,
    make_optimizer,
    restore,
    scale_first_moment,
    snapshot,
    state_tensors,
)


@dataclass(slots=True)
class Gradient:
    """This rank's slice of the gradient summed over ranks, and the norm of the whole."""

    shard: Tensor  # [P / ranks], a view of the gradient buffer; `apply` clips it in place
    norm: float  # before clipping, the same on all ranks


class TrainedModel:
    """Update rules see `master` (this rank's flat shard), the steps of an optimizer step, and `publish()`.

    With float32 weights on one rank, `master` is the weight buffer itself; otherwise it is a float32 copy of the shard
    and `publish` writes it back and gathers the other ranks' shards. An update rule that moves `master` with the
    operations of fastrl.ops gives them `weights_bf16` to write in the same pass.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, guard: Guard, grad_dtype: torch.dtype = torch.float32):
        self.model = model
        self.flat = FlatParams(model, ranks=ranks.size(), grad_dtype=grad_dtype)
        own = self.flat.weights.chunk(ranks.size())[ranks.rank()]
        self.master = own if own.dtype in (torch.float32, torch.float64) else own.float()
        self.own_weights = own
        self.device = self.master.device
        self.optim, self.guard = optim, guard
        self.optimizer = make_optimizer(optim, self.master)
        self.policy_version = 0  # weight updates published so far

    def zero_grad(self) -> None:
        self.flat.zero_grads()

    @torch.no_grad()
    def gradient(self) -> Gradient:
        """Reduce the gradient buffer over ranks. Once per accumulated gradient."""
        shard = ranks.reduce_shard(self.flat.grads)
        square = ranks.all_sum_(torch.linalg.vector_norm(shard, dtype=torch.float64).square())
        return Gradient(shard, square.sqrt().item())

    @torch.no_grad()
    def apply(self, gradient: Gradient) -> dict[str, float]:
        """Guard, clip, step, publish. Returns grad_norm (before clipping) and skipped (0 or 1).

        A gradient that is not finite, or zero everywhere, leaves parameters and optimizer state untouched on all ranks.
        Raises NumericsError when the guard has seen too many that are not finite in a row.
        """
        norm = gradient.norm
        if not self.guard.admit(norm):
            return {"grad_norm": norm, "skipped": float(norm != 0)}
        limit = self.optim.max_grad_norm
        if limit and norm > limit:
            gradient.shard.mul_(limit / norm)
        self.master.grad = gradient.shard.to(self.master.dtype)
        self.optimizer.step()
        self.master.grad = None
        self.publish()
        return {"grad_norm": norm, "skipped": 0.0}

    def optimizer_step(self) -> dict[str, float]:
        """Reduce the accumulated gradient and apply it."""
        return self.apply(self.gradient())

    @property
    def weights_bf16(self) -> Tensor | None:
        """This rank's shard of the model's weights, where they are bfloat16: `master` rounded, once published."""
        return self.own_weights if self.own_weights.dtype == torch.bfloat16 else None

    @torch.no_grad()
    def publish(self, written: bool = False) -> None:
        """Make the shards' new values the weights of the model and of the engine, on every rank.

        written: `weights_bf16` holds this rank's already.
        """
        if self.master is not self.own_weights and not written:
            self.own_weights.copy_(self.master)
        ranks.gather_shards(self.flat.weights)
        self.policy_version += 1

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def optimizer_snapshot(self) -> dict[str, Tensor]:
        """A copy of the optimizer's state, for `optimizer_restore`."""
        return snapshot(self.optimizer)

    def optimizer_restore(self, state: dict[str, Tensor]) -> None:
        restore(self.optimizer, state)

    def scale_first_moment(self, factor: float) -> None:
        scale_first_moment(self.optimizer, factor)

    def all_sum(self, values: Tensor) -> Tensor:
        """Sums over this rank's shard -> over all shards."""
        return ranks.all_sum_(values)

    def tensor_rms(self, values: Callable[[slice], Tensor]) -> Tensor:
        """values(part of this rank's shard) -> root mean square within each tensor of the model, [tensors]."""
        norms = [torch.linalg.vector_norm(values(part), dtype=torch.float64) for part in self.tensor_slices()]
        squares = self.all_sum(torch.stack(norms).square())
        sizes = squares.new_tensor([slot.numel for slot in self.flat.slots.values()])
        return (squares / sizes).sqrt().to(self.master.dtype)

    def tensor_slices(self) -> list[slice]:
        """Where the tensors of the model lie in this rank's shard, in order; a tensor that lies elsewhere is empty.

        Every rank has the same number of them, so that sums per tensor can be reduced.
        """
        size = len(self.master)
        first = ranks.rank() * size
        bounds = [(slot.offset - first, slot.offset - first + slot.numel) for slot in self.flat.slots.values()]
        return [slice(min(max(a, 0), size), min(max(b, 0), size)) for a, b in bounds]

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's shard of everything that the next optimizer step reads."""
        yield "master", self.master
        for name, tensor in state_tensors(self.optimizer).items():
            yield f"optimizer.{name}", tensor

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave, and publish it."""
        self.master.copy_(tensors["master"])
        prefix = "optimizer."
        load_state_tensors(
            self.optimizer, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        version = self.policy_version
        self.publish()
        self.policy_version = version
