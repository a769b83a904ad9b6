"""bad/step-N.json: what a person needs to see of a training step in which the guard refused an optimizer step."""

from pathlib import Path

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.log import write_json
from fastrl.base.types import RolloutGroup, TrainBatch

ROWS = 64  # of all ranks
CHARACTERS = 2000  # of a prompt, and of a completion
PER_ROW = ("reward", "credit")
PER_TOKEN = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "advantages", "returns")


def note(broken: dict[str, int], loss: Tensor | None, logprobs: Tensor, mask: Tensor) -> None:
    """Count, of a backward pass whose loss over all ranks is not finite, what of it this rank has."""
    for name, values in (("loss", loss), ("logprobs", logprobs[mask])):
        found = 0 if values is None else int((~values.isfinite()).sum())
        if found:
            broken[name] = broken.get(name, 0) + found


def not_finite(batch: TrainBatch) -> dict[str, int]:
    """Quantities of a batch that hold numbers which are not finite, and how many; only where the loss sees them."""
    counts = {}
    for name in (*PER_ROW, *PER_TOKEN):
        values = getattr(batch, name)
        if values is not None:
            seen = values if name in PER_ROW else values[batch.response_mask]
            counts[name] = int((~seen.isfinite()).sum())
    return {name: count for name, count in counts.items() if count}


def rows(groups: list[RolloutGroup], batch: TrainBatch, most: int) -> list[dict]:
    """The completions of this rank, those with a number that is not finite first, then by the size of their credit."""
    found = []
    for row, (problem, completion) in enumerate((g.problem, c) for g in groups for c in g.completions):
        credit = batch.credit[row].item()
        mask = batch.response_mask[row]
        tokens = {n: getattr(batch, n)[row][mask] for n in PER_TOKEN if getattr(batch, n) is not None}
        stats = {name: statistics(values) for name, values in tokens.items()}
        broken = completion.reward - completion.reward != 0 or credit - credit != 0
        broken |= any(s["not_finite"] for s in stats.values())
        shown = {
            "id": problem.id,
            "rank": ranks.rank(),
            "prompt": short(problem.prompt),
            "completion": short(completion.text),
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "reward": completion.reward,
            "rewards": completion.rewards,
            "credit": credit,
            **stats,
        }
        found.append((not broken, -abs(credit), shown))
    return [row for *_, row in sorted(found, key=lambda f: f[:2])[:most]]


def statistics(values: Tensor) -> dict[str, float]:
    good = values[values.isfinite()].double()
    empty = not len(good)
    return {
        "not_finite": len(values) - len(good),
        **({} if empty else {"min": good.min().item(), "mean": good.mean().item(), "max": good.max().item()}),
    }


def short(text: object) -> str:
    text = str(text)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}... ({len(text)} characters)"


@torch.no_grad()
def write(
    folder: Path,
    step: int,
    reasons: dict[str, list[str]],
    broken: dict[str, int],
    groups: list[RolloutGroup],
    batch: TrainBatch,
) -> None:
    """On all ranks; rank 0 writes. reasons: of each model; broken: what `note` has counted on this rank."""
    own = {"not_finite": not_finite(batch) | broken, "rows": rows(groups, batch, ROWS // ranks.size())}
    parts = ranks.gather(own)
    if ranks.rank() == 0:
        (folder / "bad").mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "bad" / f"step-{step}.json",
            {
                "step": step,
                "refused": reasons,
                "not_finite": {f"rank {rank}": part["not_finite"] for rank, part in enumerate(parts)},
                "completions": len(batch),
                "rows": [row for part in parts for row in part["rows"]],
            },
        )
