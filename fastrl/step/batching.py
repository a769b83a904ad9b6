"""From rollout groups to padded batches, and from batches to pieces that fit in memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from fastrl.base import faults, ranks
from fastrl.base.types import Problem, RolloutGroup, TrainBatch

ATTENTION_SLACK = 4  # padded tokens of attention, which are cheap, for each token of all other layers


def make_batch(
    groups: list[RolloutGroup], credit: Callable[[Tensor, Problem], Tensor], *, pad_id: int, max_new_tokens: int
) -> TrainBatch:
    """Groups -> one batch of their completions, right-padded, on the CPU; credit(rewards [G], problem) -> [G].

    Only microbatches go to the device: what the host decides, it decides without waiting for one.

    Where the engine's log-probabilities are not finite, or None, its tokens are no sample of the policy: such a row's
    credit is NaN, whatever reads them, so that no step is taken on it.
    """
    rows = [(g.problem.prompt_ids, c) for g in groups for c in g.completions]
    lengths = [len(prompt) + len(c.token_ids) for prompt, c in rows]
    S = max(lengths, default=1)
    ids = torch.tensor(
        [[*p, *c.token_ids] + [pad_id] * (S - n) for (p, c), n in zip(rows, lengths, strict=True)], dtype=torch.int64
    )
    rollout = torch.tensor(
        [
            [0.0] * len(p) + numbers(c.rollout_logprobs) + [0.0] * (S - n)
            for (p, c), n in zip(rows, lengths, strict=True)
        ]
    ).view(len(rows), S)
    column = torch.arange(S)
    end = torch.tensor(lengths, dtype=torch.int64)[:, None]
    start = torch.tensor([len(p) for p, _ in rows], dtype=torch.int64)[:, None]
    sizes = torch.tensor([len(g.completions) for g in groups], dtype=torch.int64)
    empty = torch.zeros(0)
    credits = faults.through("credit", torch.cat([credit(g.rewards, g.problem) for g in groups] or [empty]))
    return TrainBatch(
        input_ids=ids.view(len(rows), S),
        attention_mask=column < end,
        response_mask=(column >= start) & (column < end),
        rollout_logprobs=rollout,
        group=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        group_size=torch.repeat_interleave(sizes, sizes),
        reward=torch.cat([g.rewards for g in groups] or [empty]),
        credit=credits.masked_fill_(~rollout.isfinite().all(dim=1), torch.nan),
        truncated=torch.tensor([c.finish_reason == "length" for _, c in rows], dtype=torch.bool),
        prompt_lengths=start[:, 0],
        max_new_tokens=max_new_tokens,
    )


def numbers(logprobs: list[float | None]) -> list[float]:
    """None is NaN."""
    return [math.nan if x is None else x for x in logprobs]


def select(batch: TrainBatch, rows: Tensor) -> TrainBatch:
    """Some rows, trimmed to their longest; a copy, the batch is not changed."""
    S = int(batch.lengths()[rows].max()) if len(rows) else 1
    picked = {}
    for name in (f.name for f in fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            value = value[rows]
            picked[name] = value[:, :S] if value.ndim == 2 else value
    return replace(batch, **picked)


def cut(
    batch: TrainBatch, tokens: int, *, splits_groups: bool = True, packed: bool = False
) -> Iterator[tuple[Tensor, TrainBatch]]:
    """Yield (row indices, rows) of at most `tokens` tokens, rows of similar length together.

    Tokens count with their padding; packed, distinct ones count, a prompt once for the rows of its group, and padded
    rows, which attention still sees, may come to ATTENTION_SLACK times as many. A single row (or, with
    splits_groups=False, a single group) over the limit comes alone.
    """
    lengths, prompts, groups = batch.lengths().tolist(), batch.prompt_lengths.tolist(), batch.group.tolist()
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # stable: equal lengths keep their order
    members: dict[int, list[int]] = {}  # the group with the longest row first
    for row in rows:
        members.setdefault(groups[row], []).append(row)
    if packed and splits_groups:
        rows = [row for group in members.values() for row in group]
    units = [[row] for row in rows] if splits_groups else list(members.values())

    def grown(part: Part, unit: list[int]) -> Part:
        new = {groups[row]: prompts[row] for row in unit if groups[row] not in part.groups}
        completions = sum(lengths[row] - prompts[row] for row in unit)
        return Part(
            rows=part.rows + unit,
            groups=part.groups | new.keys(),
            longest=max(part.longest, *(lengths[row] for row in unit)),
            distinct=part.distinct + completions + sum(new.values()),
        )

    part = Part()
    for unit in units:
        larger = grown(part, unit)
        if part.rows and larger.size(packed) > tokens:
            yield piece(batch, part.rows)
            larger = grown(Part(), unit)
        part = larger
    if part.rows:
        yield piece(batch, part.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of a batch on their way to be a microbatch."""

    rows: list[int] = field(default_factory=list)
    groups: frozenset[int] = frozenset()
    longest: int = 0  # tokens
    distinct: int = 0  # tokens

    def size(self, packed: bool) -> float:
        padded = len(self.rows) * self.longest
        return max(self.distinct, padded / ATTENTION_SLACK) if packed else padded


def piece(batch: TrainBatch, rows: list[int]) -> tuple[Tensor, TrainBatch]:
    index = torch.tensor(rows)
    return index, select(batch, index)


def minibatches(batch: TrainBatch, count: int) -> list[TrainBatch]:
    """Exactly `count` batches of whole groups, as even as the groups allow; some may be empty."""
    groups = batch.group.unique_consecutive()
    parts = groups.tensor_split(count)
    return [batch] if count == 1 else [select(batch, torch.isin(batch.group, part).nonzero()[:, 0]) for part in parts]


def averages(sums: dict[str, Tensor], count: float) -> dict[str, float]:
    """Sums over this rank's rows -> over those of all ranks, divided by `count`."""
    own = torch.stack(list(sums.values())).tolist() if sums else []  # a rank may have no rows
    totals = ranks.all_counts(dict(zip(sums, own, strict=True)))
    return {name: total / count for name, total in totals.items()}


def denominator(batch: TrainBatch, normalizer: str) -> float:
    """What a summed loss is divided by, over all ranks: response tokens, completions with any, or groups with any."""
    alive = batch.response_mask.any(dim=1)
    if normalizer == "token":
        count = batch.response_mask.sum()
    elif normalizer == "completion":
        count = alive.sum()
    elif normalizer == "group":
        count = torch.tensor(len(batch.group[alive].unique()))
    else:
        raise ValueError(f"normalizer must be token, completion or group, got {normalizer!r}")
    total = ranks.all_sum_(count.double()).item()
    return max(total, 1.0)
