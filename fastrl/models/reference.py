"""The frozen initial policy, loaded only when an objective compares with it."""

import hashlib

import torch
from torch import Tensor

from fastrl.base.types import TrainBatch
from fastrl.models.head import token_logprobs
from fastrl.models.inputs import inputs_of, upload
from fastrl.models.liger import Liger
from fastrl.models.loading import load_model
from fastrl.models.ragged import Ragged
from fastrl.weights.buffer import FlatParams
from fastrl.weights.host_memory import host_memory
from fastrl.weights.offload import as_bytes


class Reference:
    """Log-probabilities of the model the run started from, at the policy's temperature.

    on_host: its weights are on the host, in locked pages for CUDA, and on the device only from `score` to `rest`.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype,
        device: str,
        attention: str,
        ragged: Ragged = "auto",
        temperature: float,
        triton: bool = False,
        on_host: bool = False,
        liger: Liger = "off",
    ):
        loaded = load_model(name, dtype=dtype, device=device, attention=attention, ragged=ragged, liger=liger)
        self.model, self.num_tokens = loaded.model.requires_grad_(False), loaded.num_tokens
        self.packs = loaded.packs
        self.inv_temperature, self.triton = 1.0 / temperature, triton
        self.weights = self.kept = None
        if on_host:
            self.weights = FlatParams(self.model, grad_dtype=None).weights  # one transfer instead of one per tensor
            size = self.weights.untyped_storage().nbytes()
            self.kept = host_memory(size, locked=self.weights.is_cuda).copy_(as_bytes(self.weights))
            self.rest()

    def rest(self) -> None:
        """Until the next score: weights that are kept on the host have no memory on the device."""
        if self.weights is not None:
            self.weights.untyped_storage().resize_(0)

    def wake(self) -> None:
        if self.weights is not None and self.kept is not None and not self.weights.untyped_storage().nbytes():
            self.weights.untyped_storage().resize_(len(self.kept))
            as_bytes(self.weights).copy_(self.kept)

    def sha256(self) -> str:
        """Of the weights, in the order of their names, at 0.7 GB/s."""
        self.wake()
        hashed = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            hashed.update(name.encode())
            copy = parameter.detach().to("cpu", copy=True)  # numpy would take the storage's right to be resized
            hashed.update(copy.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.rest()
        return hashed.hexdigest()

    def score(self, batch: TrainBatch) -> Tensor:
        """Label-aligned log-probabilities of a microbatch, [B, S] nats, zero outside the response mask."""
        self.wake()
        values, _ = token_logprobs(
            self.model,
            upload(inputs_of(batch, self.packs), self.model.device),
            inv_temperature=self.inv_temperature,
            num_tokens=self.num_tokens,
            triton=self.triton,
        )
        return values
