"""The frozen initial policy, loaded only when an objective compares with it."""

import torch
from torch import Tensor

from fastrl.model import load_model, token_logprobs
from fastrl.packing import pack
from fastrl.types import TrainBatch


class Reference:
    """Log-probabilities of the model the run started from, at the policy's temperature."""

    def __init__(
        self, name: str, *, dtype: torch.dtype, device: str, attention: str, temperature: float, triton: bool = False
    ):
        loaded = load_model(name, dtype=dtype, device=device, attention=attention)
        self.model, self.num_tokens = loaded.model.requires_grad_(False), len(loaded.tokenizer)
        self.packs = loaded.packs
        self.inv_temperature, self.triton = 1.0 / temperature, triton

    def score(self, batch: TrainBatch) -> Tensor:
        """Label-aligned log-probabilities of a microbatch, [B, S] nats, zero outside the response mask."""
        values, _ = token_logprobs(
            self.model, batch.input_ids, batch.response_mask, inv_temperature=self.inv_temperature,
            num_tokens=self.num_tokens, packed=pack(batch) if self.packs else None, triton=self.triton,
        )  # fmt: skip
        return values
