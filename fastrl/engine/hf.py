"""Sampling with the Hugging Face model itself: one batched decode loop over the trainer's own parameters.

A prompt is prefilled once and its cache repeated for its completions. Rows that have ended leave the batch. Each row
draws from its own counter-based stream, so a completion does not depend on who else is sampled or in which order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.base.types import Completion
from fastrl.engine.base import Request, Sampling
from fastrl.models.decoding import Decoding
from fastrl.models.modes import without_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPACT_WHEN = 0.25  # fraction of ended rows at which the cache is copied without them


class HFEngine:
    """Samples with `model`; its weights are the trainer's, so a weight change needs no transfer and leaves no cache."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        eos_ids: tuple[int, ...],
        pad_id: int,
        num_tokens: int,
        max_num_seqs: int = 512,
    ):
        self.model, self.num_tokens, self.pad_id, self.max_num_seqs = model, num_tokens, pad_id, max_num_seqs
        self.device = next(model.parameters()).device
        self.eos_ids = torch.tensor(eos_ids, device=self.device)
        self.policy_version = 0
        self.progress: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, loaded, max_num_seqs: int) -> "HFEngine":
        """The engine of a `fastrl.models.loading.LoadedModel`, over its own parameters."""
        return cls(
            loaded.model,
            eos_ids=loaded.eos_ids,
            pad_id=loaded.pad_id,
            num_tokens=loaded.num_tokens,
            max_num_seqs=max_num_seqs,
        )

    def generate_phase(self) -> AbstractContextManager[None]:
        return nullcontext()  # its cache lives as long as a batch

    def weights_changed(self) -> None:
        self.policy_version += 1

    def close(self) -> None:
        pass

    @torch.inference_mode()
    def sample(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        with without_checkpoints(self.model):
            return self.in_batches(requests, sampling)

    def in_batches(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        results: list[list[Completion]] = [[] for _ in requests]
        # prompts of similar length share a batch, so there is little left padding
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        batch: list[tuple[int, Request]] = []
        rows = 0
        for i in order:
            for start in range(0, len(requests[i].seeds), self.max_num_seqs):
                seeds = requests[i].seeds[start : start + self.max_num_seqs]
                if rows + len(seeds) > self.max_num_seqs:
                    self.decode(batch, sampling, results)
                    batch, rows = [], 0
                batch.append((i, Request(prompt_ids=requests[i].prompt_ids, seeds=seeds)))
                rows += len(seeds)
        if batch:
            self.decode(batch, sampling, results)
        return results

    def decode(self, batch: list[tuple[int, Request]], sampling: Sampling, results: list[list[Completion]]) -> None:
        """Sample one batch and append its completions to `results`."""
        rows = torch.tensor([k for k, (_, r) in enumerate(batch) for _ in r.seeds], device=self.device)
        seeds = torch.tensor([s for _, r in batch for s in r.seeds], device=self.device)
        text = Decoding(self.model, [r.prompt_ids for _, r in batch], pad_id=self.pad_id)
        text.select(rows)
        ids = torch.zeros(len(rows), sampling.max_new_tokens, dtype=torch.int64, device=self.device)
        precision = torch.promote_types(text.hidden.dtype, torch.float32)
        logprobs = torch.zeros(ids.shape, dtype=precision, device=self.device)
        lengths = torch.full((len(rows),), sampling.max_new_tokens, device=self.device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        at = torch.arange(len(rows), device=self.device)  # which row of the batch each running row is
        for t in range(sampling.max_new_tokens):
            self.progress()
            token, logprob = draw(text.logits(self.num_tokens), sampling, seeds[at], t)
            ids[at, t], logprobs[at, t] = token, logprob
            ended = torch.isin(token, self.eos_ids) & ~stopped[at]
            lengths[at] = torch.where(ended, t + 1, lengths[at])  # by a mask instead, the host would wait for a GPU
            stopped[at] |= ended
            running = ~stopped[at]
            num_running = int(running.sum())
            if num_running == 0 or t + 1 == sampling.max_new_tokens:
                break
            if num_running <= (1 - COMPACT_WHEN) * len(at):
                keep = running.nonzero()[:, 0]
                at, token = at[keep], token[keep]
                text.select(keep)
            text.append(token)
        table = zip(ids.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        for i, request in batch:
            for _ in request.seeds:
                row_ids, row_logprobs, n, stop = next(table)
                reason = "stop" if stop else "length"
                results[i].append(
                    Completion(token_ids=row_ids[:n], rollout_logprobs=row_logprobs[:n], finish_reason=reason)
                )


def draw(logits: Tensor, sampling: Sampling, seeds: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """logits [n, V] float32 -> token [n] and its log-probability [n] (nats) under the distribution it was drawn from.

    The inverse of the cumulative distribution at uniform(seed, t). Greedy (temperature 0) reports temperature 1.
    """
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(dim=-1)
        token = logits.argmax(dim=-1)
        return token, logprobs.gather(-1, token[:, None])[:, 0]
    logprobs = (logits / sampling.temperature).log_softmax(dim=-1)
    if sampling.top_p < 1:
        logprobs = nucleus(logprobs, sampling.top_p)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    point = uniform(seeds, t)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens with probability >= top_p, renormalised; the others -inf."""
    ordered, index = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = torch.full_like(logprobs, -torch.inf).scatter(-1, index, ordered.masked_fill(before >= top_p, -torch.inf))
    return kept.log_softmax(dim=-1)


def uniform(seeds: Tensor, t: int) -> Tensor:
    """seeds [n] int64, counter t -> [n] float64 in [0, 1): splitmix64 of seed + t, without a generator to save."""

    def signed(x: int) -> int:  # torch has no uint64 arithmetic, int64 wraps around to the same bits
        return x - (1 << 64) if x >= 1 << 63 else x

    def shifted(x: Tensor, bits: int) -> Tensor:  # logical, not arithmetic
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = seeds + signed(0x9E3779B97F4A7C15 * (t + 1) % (1 << 64))
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return shifted(x ^ shifted(x, 31), 11).double() * 2.0**-53
