"""The trained policy: log-probabilities of batches, and what update rules move."""

import torch
from torch import Tensor

from fastrl.guard import Guard
from fastrl.model import LoadedModel, token_logprobs
from fastrl.optim import OptimConfig
from fastrl.packing import pack
from fastrl.trained import TrainedModel
from fastrl.types import TrainBatch


class Policy(TrainedModel):
    def __init__(
        self, loaded: LoadedModel, optim: OptimConfig, guard: Guard, *,
        temperature: float = 1.0, grad_dtype: torch.dtype = torch.float32, triton: bool = False,
    ):  # fmt: skip
        super().__init__(loaded.model, optim, guard, grad_dtype)
        self.tokenizer, self.pad_id, self.packs = loaded.tokenizer, loaded.pad_id, loaded.packs
        self.inv_temperature, self.triton = 1.0 / temperature, triton

    def score(self, batch: TrainBatch) -> Tensor:
        """Label-aligned log-probabilities of a microbatch, [B, S] nats, zero outside the response mask."""
        return self.logprobs(batch)[0]

    def logprobs(self, batch: TrainBatch, need_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Label-aligned log-probabilities and entropy of a microbatch, [B, S] nats, differentiable."""
        return token_logprobs(
            self.model, batch.input_ids, batch.response_mask, inv_temperature=self.inv_temperature,
            num_tokens=len(self.tokenizer), need_entropy=need_entropy, head_grad_in_place=True,
            packed=pack(batch) if self.packs else None, triton=self.triton,
        )  # fmt: skip
