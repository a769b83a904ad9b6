"""The trained model: views of one flat buffer, an optimizer over this rank's shard, log-probabilities of batches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl import ranks
from fastrl.flat import FlatParams
from fastrl.guard import Guard
from fastrl.model import LoadedModel, token_logprobs
from fastrl.optim import OptimConfig, load_state_tensors, make_optimizer, state_tensors
from fastrl.packing import pack
from fastrl.types import TrainBatch


class Policy:
    """Update rules see `master` (this rank's flat float32 shard), `optimizer_step()` and `publish()`, nothing else.

    With float32 weights on one rank, `master` is the weight buffer itself; otherwise it is a float32 copy of the shard
    and `publish` writes it back and gathers the other ranks' shards.
    """

    def __init__(
        self, loaded: LoadedModel, optim: OptimConfig, guard: Guard, *,
        temperature: float = 1.0, grad_dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.pad_id, self.packs = loaded.pad_id, loaded.packs
        self.flat = FlatParams(loaded.model, ranks=ranks.size(), grad_dtype=grad_dtype)
        own = self.flat.weights.chunk(ranks.size())[ranks.rank()]
        self.master = own if own.dtype in (torch.float32, torch.float64) else own.float()
        self.own_weights = own
        self.device = self.master.device
        self.optim, self.guard = optim, guard
        self.optimizer = make_optimizer(optim, self.master)
        self.inv_temperature = 1.0 / temperature
        self.policy_version = 0  # weight updates published so far

    def zero_grad(self) -> None:
        self.flat.zero_grads()

    def logprobs(self, batch: TrainBatch, need_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Label-aligned log-probabilities and entropy of a microbatch, [B, S] nats, differentiable."""
        return token_logprobs(
            self.model, batch.input_ids, batch.response_mask, inv_temperature=self.inv_temperature,
            num_tokens=len(self.tokenizer), need_entropy=need_entropy, head_grad_in_place=True,
            packed=pack(batch) if self.packs else None,
        )  # fmt: skip

    @torch.no_grad()
    def optimizer_step(self) -> dict[str, float]:
        """Reduce, guard, clip, step, publish. Returns grad_norm (before clipping) and skipped (0 or 1).

        A gradient that is not finite, or zero everywhere, leaves parameters and optimizer state untouched on all ranks.
        Raises NumericsError when the guard has seen too many that are not finite in a row.
        """
        grad = ranks.reduce_shard(self.flat.grads)
        square = ranks.all_sum_(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
        norm = square.sqrt().item()
        if not self.guard.admit(norm):
            return {"grad_norm": norm, "skipped": float(norm != 0)}
        limit = self.optim.max_grad_norm
        if limit and norm > limit:
            grad.mul_(limit / norm)
        self.master.grad = grad if grad.dtype == self.master.dtype else grad.to(self.master.dtype)
        self.optimizer.step()
        self.master.grad = None
        self.publish()
        return {"grad_norm": norm, "skipped": 0.0}

    @torch.no_grad()
    def publish(self) -> None:
        """Make the shards' new values the weights of the model and of the engine, on every rank."""
        if self.master is not self.own_weights:
            self.own_weights.copy_(self.master)
        ranks.gather_shards(self.flat.weights)
        self.policy_version += 1

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

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
