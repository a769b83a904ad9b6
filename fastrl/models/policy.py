"""The trained policy: log-probabilities of batches, and what update rules move."""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.base.types import TrainBatch
from fastrl.kernels.workspace import Workspace
from fastrl.models.head import token_logprobs, token_policy_loss
from fastrl.models.inputs import Inputs, inputs_of, upload
from fastrl.models.loading import LoadedModel
from fastrl.models.tokens import num_sampled
from fastrl.objectives.base import FusedLoss
from fastrl.weights.guard import Guard
from fastrl.weights.optim import OptimConfig
from fastrl.weights.shard import MasterKind, Offload, ShardedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Policy(ShardedModel):
    model: "PreTrainedModel"

    def __init__(
        self,
        loaded: LoadedModel,
        optim: OptimConfig,
        guard: Guard,
        *,
        temperature: float = 1.0,
        grad_dtype: torch.dtype = torch.float32,
        triton: bool = False,
        master: MasterKind = "float32",
        offload: Offload = "none",
    ):
        super().__init__(loaded.model, optim, guard, grad_dtype, master=master, offload=offload)
        self.tokenizer, self.pad_id, self.packs = loaded.tokenizer, loaded.pad_id, loaded.packs
        self.inv_temperature, self.triton = 1.0 / temperature, triton
        self.workspace = Workspace()  # the logits of every microbatch, until the next `rest`

    def rest(self) -> None:
        super().rest()
        self.workspace.release()

    def score(self, batch: TrainBatch) -> Tensor:
        """Label-aligned log-probabilities of a microbatch, [B, S] nats, zero outside the response mask."""
        return self.logprobs(upload(inputs_of(batch, self.packs), self.device))[0]

    @cached_property
    def num_tokens(self) -> int:
        """How many ids can be sampled, from 0 on; the head's other rows are padding."""
        return num_sampled(self.model, self.tokenizer)

    @property
    def fuses(self) -> bool:
        """Whether `fused_loss` can be called: on Triton, with a float32 gradient buffer to add the head's to."""
        grads = self.flat.grads
        return self.triton and grads is not None and grads.dtype == torch.float32

    def fused_loss(self, inputs: Inputs, fused: FusedLoss, count: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A microbatch, what the objective says of it, its denominator -> loss, logprobs [B, S], sums for metrics.

        The loss is divided already: its backward() must follow, unscaled. The sums are those of `objective.loss_sum`.
        """
        with self.saving():
            out, logprobs = token_policy_loss(
                self.model,
                inputs,
                fused,
                count,
                inv_temperature=self.inv_temperature,
                num_tokens=self.num_tokens,
                workspace=self.workspace,
            )
        sums = out.named()
        # a token that is not finite has no part in the fused loss; autograd would pass it on, and the guard see it
        assert self.flat.grads is not None
        self.flat.grads[:1] += torch.where(sums["nonfinite"] > 0, torch.nan, 0.0)
        metrics = fused.loss.metrics(sums, has_reference=fused.ref_logprobs is not None)
        return out.loss, logprobs, {"entropy": out.entropy.sum(), **metrics}

    def logprobs(self, inputs: Inputs, need_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Label-aligned log-probabilities and entropy of a microbatch, [B, S] nats, differentiable."""
        with self.saving():
            return token_logprobs(
                self.model,
                inputs,
                inv_temperature=self.inv_temperature,
                num_tokens=self.num_tokens,
                need_entropy=need_entropy,
                head_grad_in_place=True,
                triton=self.triton,
                workspace=self.workspace,
            )
