"""Weights under training: one flat buffer, this rank's float32 shard of it, an optimizer and a guard over the shard."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from fastrl.base import faults, ranks
from fastrl.weights.activations import saved_on_host
from fastrl.weights.buffer import BLOCK, PART, FlatParams
from fastrl.weights.guard import Guard
from fastrl.weights.halves import join, split
from fastrl.weights.halves_adamw import HalvesAdamW
from fastrl.weights.halves_optim import SplitOptimizer
from fastrl.weights.host_slabs import HostSlabs
from fastrl.weights.moves import Extrapolation, extrapolate_, interpolate_
from fastrl.weights.moves_ref import FlatStats, direction
from fastrl.weights.norm import norm_over_ranks, squared_norm, squared_norm_in_float64
from fastrl.weights.offload import HostCopies
from fastrl.weights.optim import OptimConfig, ShardOptimizer

Offload = Literal["none", "optimizer", "activations", "optimizer,activations"]
MasterKind = Literal["float32", "split"]
Pair = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Gradient:
    """This rank's slice of the gradient summed over ranks, the norm of the whole, and the loss it is of."""

    shard: Tensor  # [P / ranks], a view of the gradient buffer; `apply` clips it in place
    norm: float  # before clipping, the same on all ranks
    loss: float  # the same on all ranks


class WrittenAlong(TypedDict):
    """What a move writes in the same pass, as arguments of weights/moves.py."""

    low: Tensor | None
    out_bf16: Tensor | None


class ShardedModel:
    """What is trained: update rules see it as a `Shard` (updates/base.py), which moves and is published.

    With float32 weights on one rank, `master` is the weight buffer itself; otherwise it is a float32 copy of the shard
    and `publish` writes it back and gathers the other ranks' shards. A split `master` is the shard of the bfloat16
    weights, and `low` what they lack of float32. Moves write `low`, or the bfloat16 weights, in the same pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        guard: Guard,
        grad_dtype: torch.dtype = torch.float32,
        *,
        master: MasterKind = "float32",
        offload: Offload = "none",
    ):
        self.model, self.offload = model, offload
        self.flat = FlatParams(model, ranks=ranks.size(), grad_dtype=grad_dtype)
        own = self.flat.weights.chunk(ranks.size())[ranks.rank()]
        self.own_weights, self.low = own, None
        if master == "split":
            self.master, self.low = own, torch.zeros_like(own, dtype=torch.int16)
            self.optimizer = (HalvesAdamW if optim.name == "adamw" else SplitOptimizer)(optim, own, self.low)
        else:
            self.master = own if own.dtype in (torch.float32, torch.float64) else own.float()
            self.optimizer = ShardOptimizer(optim, self.master)
        self.device = self.master.device
        self.optim, self.guard, self.host = optim, guard, HostCopies()
        self.slabs = HostSlabs(locked=own.is_cuda) if "activations" in offload else None
        self.policy_version = 0  # weight updates published so far
        self.own_broken = 0  # gradients of this rank that were not finite, before they were reduced

    def zero_grad(self) -> None:
        self.flat.zero_grads()

    def rest(self) -> None:
        """Until `wake`, only the weights are needed: gradients have no memory, and what is offloaded is on the host."""
        self.flat.drop_grads()
        if "optimizer" in self.offload:
            beside_weights = self.master if self.low is None else self.low
            if beside_weights is not self.own_weights:
                self.host.put(beside_weights)
            for tensor in self.optimizer.resident():
                self.host.put(tensor)

    def wake(self) -> None:
        """Master and optimizer state are back, bit for bit, and gradients have memory again, not yet zero."""
        self.host.back()
        self.flat.take_grads()

    def saving(self) -> AbstractContextManager:
        """Around a forward: where its activations go."""
        return saved_on_host(self.flat.weights, self.slabs)

    @property
    def like(self) -> Tensor:
        """Shape, dtype and device of a snapshot; holds nothing."""
        return torch.empty_like(self.master, dtype=torch.float32 if self.low is not None else None, device="meta")

    @torch.no_grad()
    def snapshot(self) -> Tensor:
        """A copy of this rank's shard, float32 (or float64)."""
        return self.master.clone() if self.low is None else join(self.master, self.low)

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Set this rank's shard; not published."""
        if self.low is None:
            self.master.copy_(values)
            return
        for high, low, own in zip(*(x.split(PART) for x in (self.master, self.low, values)), strict=True):
            parts = split(own.to(self.device))
            high.copy_(parts[0])
            low.copy_(parts[1])

    def restore(self, anchor: Tensor) -> None:
        """Go back to a snapshot, and publish."""
        self.assign(anchor)
        self.publish()

    def interpolate(self, anchor: Tensor, alpha: float) -> dict[str, float]:
        """theta <- anchor + alpha (theta - anchor), published -> the sums of FlatStats over all ranks."""
        sums = interpolate_(self.master, anchor, alpha, **self.written_along()).sums
        return self.published(sums)

    def extrapolate(
        self, anchor: Tensor, law: Extrapolation, *, grads: Pair | None = None, u0: Tensor | None = None
    ) -> dict[str, float]:
        """theta, two steps from the anchor, goes where `law` leads each coordinate, published -> sums over all ranks.

        grads: the gradients of the two steps; or u0: the first step itself, of decoupled AdamW.
        """
        lr, decay = self.lr, self.optim.weight_decay
        threshold = segment = None
        if law.active_threshold:

            def first(part: slice) -> Tensor:
                if u0 is not None:
                    return direction(anchor[part], u0[part], lr, decay)
                assert grads is not None
                return grads[0][part]

            threshold = law.active_threshold * self.tensor_rms(first)
            segment = segments(self.tensor_slices(), self.master)
        sums = extrapolate_(
            self.master,
            anchor,
            law.lookahead,
            law.alpha,
            grads=grads,
            u0=u0,
            lr=lr,
            weight_decay=decay,
            ratio_min=law.ratio_min,
            ratio_max=law.ratio_max,
            scale_max=law.scale_max,
            threshold=threshold,
            segment=segment,
            **self.written_along(),
        ).sums
        return self.published(sums, anchor, law)

    def extrapolate_by_tensor(self, anchor: Tensor, law: Extrapolation, grads: Pair) -> dict[str, float]:
        """As `extrapolate`, with one ratio for each tensor of the model: <g0, g1> / <g0, g0>."""
        (g0, g1), slices = grads, self.tensor_slices()
        products = [torch.stack([inner_product(g0[s], g1[s]), inner_product(g0[s], g0[s])]) for s in slices]
        ratio, scale = law.by_tensor(*ranks.all_sum_(torch.stack(products)).unbind(dim=1))
        total = torch.zeros(len(FlatStats.NAMES), dtype=torch.float64, device=self.device)
        extra = [0.0] * len(FlatStats.NAMES)  # of the host: read once for all tensors, and added once
        for part, (own, r) in zip(slices, torch.stack([scale, ratio], dim=1).tolist(), strict=True):
            along = self.written_along(part)
            total += interpolate_(self.master[part], anchor[part], law.alpha * own, **along).sums
            n = part.stop - part.start
            counts = {"active": n, "ratio": n * r, "ratio_sq": n * r * r, "scale": n * own}
            extra = [
                sum_so_far + counts.get(name, 0.0) for name, sum_so_far in zip(FlatStats.NAMES, extra, strict=True)
            ]
        return self.published(total + total.new_tensor(extra), anchor, law)

    def published(
        self, sums: Tensor, anchor: Tensor | None = None, law: Extrapolation | None = None
    ) -> dict[str, float]:
        """Publish a move that wrote its bfloat16 weights along -> its sums over all ranks.

        Where the mean of alpha scale is below the law's least one, the anchor is published instead: "refused" is 1.
        """
        stats = FlatStats(ranks.all_sum_(sums)).named()
        stats["refused"] = float(law is not None and law.multiplier(stats) < law.min_multiplier)
        if stats["refused"]:
            assert anchor is not None
            interpolate_(self.master, anchor, 0.0, **self.written_along())
        self.publish(written=self.weights_bf16 is not None)
        return stats

    def written_along(self, part: slice | None = None) -> WrittenAlong:
        """With a move of `master`, or of that part of it."""
        low, out = (x if x is None or part is None else x[part] for x in (self.low, self.weights_bf16))
        return WrittenAlong(low=low, out_bf16=out)

    @torch.no_grad()
    def gradient(self, loss: float) -> Gradient:
        """Reduce the gradient buffer over ranks. Once per accumulated gradient; loss: what it is of."""
        grads = self.flat.grads
        assert grads is not None
        faults.through("grad", grads)
        # gloo sums in place, and then no one knows whose it was; NCCL leaves the buffer as it is
        own = squared_norm(grads) if ranks.size() > 1 and not grads.is_cuda else None
        shard = ranks.reduce_shard(grads)
        norm = norm_over_ranks(shard)
        if not math.isfinite(norm):
            own = squared_norm_in_float64(grads) if own is None else own
            self.own_broken += not math.isfinite(own.item())
        return Gradient(shard, norm, loss)

    @torch.no_grad()
    def apply(self, gradient: Gradient) -> dict[str, float]:
        """Guard, clip, step, publish. Returns grad_norm (before clipping) and skipped (0 or 1).

        A gradient that the guard refuses leaves parameters and optimizer state untouched on all ranks.
        """
        norm, refused = gradient.norm, self.guard.skipped
        if not self.guard.admit(norm, gradient.loss):
            return {"grad_norm": norm, "skipped": float(self.guard.skipped - refused)}
        limit = self.optim.max_grad_norm
        faults.at("optimizer")
        self.optimizer.step(gradient.shard, divisor=norm / limit if limit and norm > limit else 1.0)
        self.publish()
        return {"grad_norm": norm, "skipped": 0.0}

    def optimizer_step(self, loss: float) -> dict[str, float]:
        """Reduce the accumulated gradient and apply it."""
        return self.apply(self.gradient(loss))

    @property
    def weights_bf16(self) -> Tensor | None:
        """This rank's shard of the model's weights, where they are `master` rounded to bfloat16, once published."""
        return self.own_weights if self.own_weights.dtype == torch.bfloat16 and self.low is None else None

    @torch.no_grad()
    def publish(self, written: bool = False) -> None:
        """Make the shards' new values the weights of the model and of the engine, on every rank.

        written: `weights_bf16` holds this rank's already.
        """
        if self.master is not self.own_weights and not written:
            self.own_weights.copy_(self.master)
        faults.at("allgather")
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
        return self.optimizer.snapshot()

    def optimizer_restore(self, state: dict[str, Tensor]) -> None:
        self.optimizer.restore(state)

    def scale_first_moment(self, factor: float) -> None:
        self.optimizer.scale_first_moment(factor)

    def inner_products(self, pairs: Sequence[Pair]) -> list[float]:
        """Pairs of vectors like the shard -> their inner products over all ranks."""
        return ranks.all_sum_(torch.stack([inner_product(a, b) for a, b in pairs])).tolist()

    def tensor_rms(self, values: Callable[[slice], Tensor]) -> Tensor:
        """values(part of this rank's shard) -> root mean square within each tensor of the model, [tensors]."""
        slices = self.tensor_slices()
        squares = torch.zeros(len(slices), dtype=torch.float64, device=self.device)
        for own, part in zip(squares, slices, strict=True):
            for piece in pieces(part):
                own += squared_norm(values(piece))
        ranks.all_sum_(squares)
        sizes = squares.new_tensor([slot.numel for slot in self.flat.slots.values()])
        return (squares / sizes).sqrt().to(torch.promote_types(self.master.dtype, torch.float32))

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
        read = self.host.read
        if self.low is None:
            yield "master", read(self.master)
        else:
            yield "master", join(self.master.cpu(), read(self.low).cpu())
        for name, tensor in self.optimizer.state_tensors(read).items():
            yield f"optimizer.{name}", tensor

    def state_names(self) -> list[str]:
        """The names that `state_tensors` gives."""
        return ["master", *(f"optimizer.{name}" for name in self.optimizer.state_names())]

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave, and publish it."""
        self.wake()
        self.assign(tensors["master"])
        prefix = "optimizer."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.optimizer.load_state_tensors(own)
        version = self.policy_version
        self.publish()
        self.policy_version = version


def pieces(part: slice) -> list[slice]:
    """A part of a shard in chunks of PART elements, so that what is calculated of one is small; one if it is empty."""
    return [slice(a, min(a + PART, part.stop)) for a in range(part.start, part.stop, PART)] or [part]


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """[n], [n] -> [] float64; the products of a chunk are alive at a time."""
    chunks = zip(a.split(PART), b.split(PART), strict=True)
    return torch.stack([(x * y).sum() for x, y in chunks]).double().sum()


def segments(slices: list[slice], shard: Tensor) -> Tensor:
    """[blocks] int64: which tensor each block of a shard belongs to; padding belongs to the tensor before."""
    index = torch.zeros(-(-len(shard) // BLOCK), dtype=torch.int64, device=shard.device)
    for number, part in enumerate(slices):
        if part.stop > part.start:
            index[part.start // BLOCK :] = number
    return index
