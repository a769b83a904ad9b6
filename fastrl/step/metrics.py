"""Numbers about sampled groups: what a training step logs, and the scores of an evaluation with their intervals."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.types import RolloutGroup, TrainBatch

T = TypeVar("T")

MAX_LOST_FRAC = 0.02  # of the graded completions of a step: timeouts and lost processes


def rollout_table(groups: list[RolloutGroup], *, first: int = 0, stride: int = 1) -> Tensor:
    """[completions, 4] float64: group number, reward, tokens, cut off.

    first, stride: rank and ranks, so that the rows of all ranks can be put together.
    """
    rows = [
        (first + g * stride, c.reward, len(c.token_ids), c.finish_reason == "length")
        for g, group in enumerate(groups)
        for c in group.completions
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def rollout_metrics(table: Tensor) -> dict[str, float]:
    """`rollout_table` -> reward, signal and length metrics, in TRL's names."""
    group, reward, length, cut_off = table.unbind(dim=1)
    number = group.to(torch.int64)
    size = torch.bincount(number).double()
    present = size > 0
    mean = torch.bincount(number, reward)[present] / size[present]
    spread = reward - mean[(present.cumsum(0) - 1)[number]]
    variance = torch.bincount(number, spread.square())[present] / (size[present] - 1).clamp(min=1)
    low = torch.full_like(size, torch.inf).scatter_reduce(0, number, reward, "amin")[present]
    high = torch.full_like(size, -torch.inf).scatter_reduce(0, number, reward, "amax")[present]
    flat = low == high
    ended = length[cut_off == 0]
    return {
        "reward": reward.mean().item(),
        "reward_std": variance.sqrt().mean().item(),
        "frac_reward_zero_std": flat.double().mean().item(),
        "frac_reward_zero_std/all_right": (flat & (high > 0)).double().mean().item(),
        "frac_reward_zero_std/all_wrong": (flat & (high <= 0)).double().mean().item(),
        "completions/mean_length": length.mean().item(),
        "completions/min_length": length.min().item(),
        "completions/max_length": length.max().item(),
        "completions/mean_terminated_length": ended.mean().item() if len(ended) else math.nan,
        "completions/clipped_ratio": cut_off.mean().item(),
    }


def reward_function_sums(groups: list[RolloutGroup]) -> dict[str, float]:
    """Count, sum and sum of squares of each reward function over the completions it applies to; ranks can be added."""
    sums: dict[str, float] = {}
    for group in groups:
        for completion in group.completions:
            for name, value in completion.rewards.items():
                if value is not None:
                    for power in range(3):
                        key = f"{name}/{power}"
                        sums[key] = sums.get(key, 0.0) + value**power
    return sums


def reward_function_metrics(sums: dict[str, float]) -> dict[str, float]:
    """`reward_function_sums` -> rewards/<function>/mean and /std (unbiased)."""
    metrics = {}
    for name in [key.removesuffix("/0") for key in sums if key.endswith("/0")]:
        n, total, squares = (sums[f"{name}/{power}"] for power in range(3))
        metrics[f"rewards/{name}/mean"] = total / n
        metrics[f"rewards/{name}/std"] = math.sqrt(max(0.0, squares - total**2 / n) / max(1.0, n - 1))
    return metrics


def lost_grades(statuses: dict[str, float]) -> list[str]:
    """Completions of a batch by `Grade` status -> a warning when over 2 % of those graded got no grade in time."""
    graded = sum(n for name, n in statuses.items() if name != "truncated")
    lost = {name: statuses[name] for name in ("soft_timeout", "hard_timeout", "died") if statuses.get(name)}
    if sum(lost.values()) <= MAX_LOST_FRAC * graded:
        return []
    said = ", ".join(f"{n:.0f} {name}" for name, n in lost.items())
    return [
        f"ALARM: {sum(lost.values()):.0f} of {graded:.0f} answers got no grade in time and earn 0: {said}. Look at "
        "rollouts/ for what the policy writes there; if it is right, more --reward-workers or a lighter verifier"
    ]


def pass_at(k: int, num_correct: int, n: int) -> float:
    """Probability that k of n completions drawn without replacement hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv:2107.03374, section 2.1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n, got k={k}, n={n}")
    return 1.0 - math.comb(n - num_correct, k) / math.comb(n, k)


def majority(keys: list[str | None], correct: list[bool]) -> float:
    """Whether the most frequent answer is right; among equally frequent ones, the share that is. No answer has no vote.

    Example: keys [a, a, b, b, None], a right -> 0.5
    """
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {key for key, count in votes.items() if count == most}
    right = {key for key, ok in zip(keys, correct, strict=True) if ok}
    return len(winners & right) / len(winners)


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists of N values, equal ones sharing their mean rank; NaN if one list is constant."""

    def mean_ranks(values: list[float]) -> Tensor:
        _, place, counts = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2.0)[place]

    x, y = (ranks - ranks.mean() for ranks in map(mean_ranks, (a, b)))
    return (x @ y / (x.square().sum() * y.square().sum()).sqrt()).item()


def interval95(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of values in [0, 1], one per problem.

    Wilson's, at the number of independent answers that would have the values' own variance; so it neither collapses at
    0 and 1 nor counts the completions of one problem as independent.
    """
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n
    n_effective = mean * (1 - mean) / variance if variance > 0 else n
    z2 = 1.959964**2
    center = (mean + z2 / (2 * n_effective)) / (1 + z2 / n_effective)
    half = math.sqrt(z2 * mean * (1 - mean) / n_effective + (z2 / (2 * n_effective)) ** 2) / (1 + z2 / n_effective)
    return max(0.0, center - half), min(1.0, center + half)


def evaluation_table(groups: list[RolloutGroup], correct: list[list[bool]], keys: list[list[str | None]]) -> Tensor:
    """[problems, 5] float64: completions, right ones, majority right, total tokens, cut off."""
    rows = [
        (
            len(g.completions),
            sum(ok),
            majority(votes, ok),
            sum(len(c.token_ids) for c in g.completions),
            sum(c.finish_reason == "length" for c in g.completions),
        )
        for g, ok, votes in zip(groups, correct, keys, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 5)


def evaluation_metrics(table: Tensor) -> dict[str, float]:
    """`evaluation_table` -> avg@k, pass@1, 2, 4, ... k and maj@k with ci95 bounds, mean length, cut-off fraction."""
    k = int(table[:, 0].min())
    rows = table.tolist()
    per_problem = {f"avg@{k}": [c / n for n, c, *_ in rows]}
    for j in sorted({1 << i for i in range(k.bit_length())} | {k}):
        if j <= k:
            per_problem[f"pass@{j}"] = [pass_at(j, int(c), int(n)) for n, c, *_ in rows]
    per_problem[f"maj@{k}"] = [m for _, _, m, *_ in rows]
    metrics: dict[str, float] = {}
    for name, values in per_problem.items():
        metrics[name] = sum(values) / len(values)
        metrics[f"{name}/ci95_low"], metrics[f"{name}/ci95_high"] = interval95(values)
    completions = table[:, 0].sum().item()
    metrics["length"] = table[:, 3].sum().item() / completions
    metrics["clipped_ratio"] = table[:, 4].sum().item() / completions
    metrics["num_problems"] = len(rows)
    return metrics


def sampling_mismatch(difference: torch.Tensor) -> dict[str, float]:
    """logprobs - rollout_logprobs of sampled tokens [N], before any update -> how far engine and trainer are apart."""
    if not len(difference):
        return {}
    difference = difference.double()
    ratio = difference.exp()
    values = {
        "sampling/sampling_logp_difference/mean": difference.abs().mean(),
        "sampling/sampling_logp_difference/max": difference.abs().max(),
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
        "sampling/mismatch_kl": (torch.expm1(difference) - difference).mean(),
        "sampling/token_mult_prob_error/mean": difference.abs().exp().mean(),
        "sampling/token_mult_prob_error/median": difference.abs().exp().median(),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def mismatch_of_ranks(parts: list[tuple[dict[str, float], int | None]]) -> tuple[dict[str, float], dict[str, float]]:
    """`sampling_mismatch` and its tokens, by rank -> that of all tokens, and the worst of each number on any rank.

    Medians cannot be put together: of all tokens, too, the largest median of a rank is taken. The worst mean ratio is
    the one furthest from 1. A NaN is worse than anything.
    """
    found = [(values, tokens) for values, tokens in parts if tokens]
    if not found:
        return {}, {}
    total = sum(tokens for _, tokens in found)
    whole, worst = {}, {}
    for name in found[0][0]:
        each = [values[name] for values, _ in found]
        broken = any(map(math.isnan, each))
        largest = math.nan if broken else max(each)
        worst[name] = largest
        if name.endswith("importance_sampling_ratio/mean"):
            worst[name] = math.nan if broken else max(each, key=lambda ratio: abs(math.log(max(ratio, 1e-300))))
        if name.endswith("/min"):
            whole[name] = worst[name] = math.nan if broken else min(each)
        elif name.endswith(("/max", "/median")):
            whole[name] = largest
        else:
            whole[name] = sum(values[name] * tokens for values, tokens in found) / total
    return (found[0][0], found[0][0]) if len(found) == 1 else (whole, worst)


def one_token_rows(batch: TrainBatch, *, share: float = 0.8, fewest: int = 8) -> Tensor:
    """[]: completions of at least `fewest` tokens of which one token makes up `share` (above a half) or more."""
    column = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    mask = batch.attention_mask & (column >= batch.prompt_lengths[:, None])
    length = mask.sum(dim=1)
    # a token in more than half of the positions is their median
    ids = batch.input_ids.double().masked_fill(~mask, torch.nan)
    same = (ids == ids.nanmedian(dim=1, keepdim=True).values).sum(dim=1)
    return ((same >= share * length) & (length >= fewest)).sum()


def rollout_rows(groups: list[RolloutGroup], batch: TrainBatch) -> list[list[dict]]:
    """What was sampled in a step on this rank: of each group one dict per completion."""
    credits = iter(batch.credit.tolist())
    return [
        [
            {
                "id": g.problem.id,
                "prompt": g.problem.prompt,
                "answer": g.problem.answer,
                "completion": c.text,
                "token_ids": c.token_ids,
                "finish_reason": c.finish_reason,
                "reward": c.reward,
                "rewards": c.rewards,
                "credit": next(credits),
            }
            for c in g.completions
        ]
        for g in groups
    ]


def in_order_of_the_plan(own: list[T]) -> Iterator[T]:
    """Items of this rank's groups -> those of all ranks, as the plan had them before rank r took every r-th group.

    Collective: every rank must take all of them. One item of each rank is in memory at a time.
    """
    for turn in range(round(ranks.all_max(float(len(own))))):
        yield from (item for part in ranks.gather(own[turn : turn + 1]) for item in part)
