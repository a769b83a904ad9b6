"""Ranks with uneven work, and groups that only one of them drops: the same collectives on every rank, and no hang."""

import json
import random
from pathlib import Path

import pytest

from fastrl.data.arithmetic import Arithmetic
from support.programs import together

# one pair of processes for all trials. Every function of torch.distributed that fastrl.base.ranks calls is written down
SCRIPT = """
import json, os, sys
os.environ["FASTRL_FAULT"] = "sleep=0@forward"  # inert, and visits are counted
from pathlib import Path
import torch, torch.distributed as dist
from support.trainers import make_trainer
from fastrl.base import faults, ranks
torch.set_num_threads(1)
ranks.start("cpu", 60)
CALLED = ("all_reduce", "all_gather", "all_gather_object", "barrier")
gather, calls = dist.all_gather_object, []

def recorded(name, function):
    def call(*args, **options):
        calls.append([name, *(list(a.shape) for a in args if isinstance(a, torch.Tensor))])
        return function(*args, **options)
    return call

for name in CALLED:
    setattr(dist, name, recorded(name, getattr(dist, name)))
ranks.gather_flat = recorded("gather_flat", ranks.gather_flat)
found = []
for number, args in enumerate(json.loads(Path({trials!r}).read_text())):
    trainer = make_trainer(Path({folder!r}) / str(number) / "run", *args)
    calls.clear()
    faults.from_environment().visits.clear()
    learning = []
    silent = trainer.learner.objective.silent
    def watched(batch):
        rows = silent(batch)
        learning.append(int((~rows).sum()))
        return rows
    object.__setattr__(trainer.learner.objective, "silent", watched)
    reason = trainer.run()
    own = dict(calls=list(calls), forwards=faults.from_environment().visits["forward"], learning=learning,
               weights=float(trainer.learner.policy.flat.weights.double().sum()), reason=reason)
    both = [None, None]
    gather(both, own)
    found.append(both)
    trainer.rollout.rewards.close()
if ranks.rank() == 0:
    Path({out!r}).write_text(json.dumps(found))
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""

# problems of odd level give all completions the same reward, so their groups teach nothing; which rank gets them is
# left to the shuffle
REWARD = """
def uneven(completions, level, **columns):
    return [0.5 if odd % 2 else sum(map(ord, text)) % 3 / 2 for text, odd in zip(completions, level)]
"""
OBJECTIVE = [
    ["--drop-zero-std"],
    ["--overlong", "mask"],
    ["--overlong", "penalty", "--adv-norm", "batch", "--drop-zero-std"],
    ["--kl", 0.01, "--loss-agg", "seq"],
    ["--objective", "ppo"],
    ["--objective", "rebel"],
    ["--objective", "rebel", "--paired"],
    ["--objective", "apo"],
]
UPDATE = [
    ["--epochs-per-batch", 2],
    ["--update", "sfpo"],
    ["--update", "gxpo"],
    ["--update", "gxpo", "--ratio", "tensor"],
]
ALLOCATION = [["--group-size", 2], ["--group-size", 3], ["--allocation", "sgpo"], ["--allocation", "apo_filter"]]


def trial(draw: random.Random) -> list:
    """Flags of a run of two steps: an odd number of problems, and microbatches of few tokens."""
    allocation, objective = draw.choice(ALLOCATION), draw.choice(OBJECTIVE)
    if allocation[-1] == "apo_filter":
        allocation = [*allocation, "--group-size", 2]
    problems = draw.choice([3, 5, 7])
    return [
        *allocation,
        *objective,
        *draw.choice(UPDATE),
        "--problems-per-step",
        problems,
        "--minibatches",
        draw.randint(1, problems // 2),
        "--tokens-per-microbatch",
        draw.choice([16, 40, 100]),
        "--max-new-tokens",
        draw.choice([2, 6]),
        "--eval-limit",
        draw.choice([1, 3]),
        "--seed",
        draw.randrange(1000),
        "--steps",
        2,
        "--eval-k",
        1,
        "--eval-every",
        1,
        "--grade-truncated",
        "--sample-every",
        0,
        "--rollouts-every",
        0,
        "--num-profile-completions",
        4,
        "--reward-workers",
        1,
    ]


def run(folder: Path, seeds: list[int]) -> list[list[dict]]:
    """The trials of some seeds on two ranks -> for each trial what each rank did."""
    levels = random.Random(1)
    rows = [
        json.dumps({"prompt": p.prompt, "answer": p.answer, "level": levels.randrange(2)})
        for p in Arithmetic().load("test")[:24]
    ]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    (folder / "uneven.py").write_text(REWARD)
    data = [
        "--data",
        folder / "problems.jsonl",
        "--eval",
        folder / "problems.jsonl",
        "--instruction",
        "",
        "--reward",
        f"{folder / 'uneven.py'}:uneven",
    ]
    trials = [[*map(str, [*data, *trial(random.Random(seed))])] for seed in seeds]
    (folder / "trials.json").write_text(json.dumps(trials))
    paths = dict(folder=str(folder / "runs"), out=str(folder / "out.json"))
    together(folder, SCRIPT.format(trials=str(folder / "trials.json"), **paths), timeout=280)
    return json.loads((folder / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param([1, 3], marks=pytest.mark.promise("E4", trials=2)),
        pytest.param([0, 2, *range(4, 20)], marks=[pytest.mark.soak, pytest.mark.promise("E4", trials=18)]),
    ],
    ids=["two", "eighteen"],
)
def test_uneven_ranks_call_the_same_collectives(seeds, tmp_path):
    found = run(tmp_path, seeds)
    assert len(found) == len(seeds)
    for one, other in found:
        assert one["calls"] == other["calls"] and len(one["calls"]) > 20
        assert one["weights"] == other["weights"] and one["reason"] == other["reason"] == "done"
    # the trials are what they say: ranks that cut more microbatches than the other, and minibatches that teach on one
    assert any(one["forwards"] != other["forwards"] for one, other in found)
    pairs = [pair for one, other in found for pair in zip(one["learning"], other["learning"], strict=False)]
    assert any((a == 0) != (b == 0) for a, b in pairs)
