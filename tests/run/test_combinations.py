"""Every objective under every update rule and every allocation: finite, and the same when it goes on from a save."""

import itertools
import json
import math

import pytest
import torch

from fastrl import checkpoint
from fastrl.allocation import ALLOCATORS
from fastrl.data.arithmetic import Arithmetic
from fastrl.objectives import OBJECTIVES
from fastrl.settings.run import configure
from fastrl.updates import UPDATES
from support.trainers import make_trainer

SMALL = [
    "--reward",
    "last_character",
    "--instruction",
    "",
    "--problems-per-step",
    4,
    "--eval-limit",
    2,
    "--eval-k",
    1,
    "--num-profile-completions",
    4,
    "--seed",
    5,
    "--lr",
    1e-3,
    "--rollouts-every",
    0,
    "--sample-every",
    0,
    "--steps",
    5,
]
# gates that trip within five steps
UPDATE = {
    "single": ["--epochs-per-batch", 2],
    "sfpo": ["--gate-window", 2, "--gate-threshold", 0.1, "--decay-steps", 2],
    "gxpo": ["--gate-window", 2, "--gate-threshold", 0.1, "--gate-warmup", 0, "--gate-patience", 1],
}
ALLOCATION = {"uniform": ["--group-size", 2], "sgpo": [], "apo_filter": ["--group-size", 2]}
ALL = list(itertools.product(OBJECTIVES, UPDATES, ALLOCATORS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders lie side by side, so that all of them share one profile; and a few problems."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [json.dumps({"prompt": p.prompt, "answer": p.answer}) for p in Arithmetic().load("test")[:32]]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    return folder


def trainer_of(folder, objective, update, allocation):
    axes = ["--objective", objective, "--update", update, "--allocation", allocation]
    data = ["--data", folder.parent / "problems.jsonl"]
    return make_trainer(folder, *data, *SMALL, *axes, *UPDATE.get(update, []), *ALLOCATION.get(allocation, []))


def take(trainer, steps):
    """The metrics of the next steps, without times."""
    records = []
    for _ in range(steps):
        metrics = trainer.step()
        records.append({k: v for k, v in metrics.items() if not k.startswith(("timing_s/", "perf/"))})
    return records


@pytest.mark.slow
@pytest.mark.parametrize("objective, update, allocation", ALL, ids=["-".join(names) for names in ALL])
def test_five_steps_the_last_two_again_from_a_checkpoint(objective, update, allocation, runs):
    name = f"{objective}-{update}-{allocation}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    straight = trainer_of(runs / name, objective, update, allocation)
    records = take(straight, 3)
    straight.save()
    expected = take(straight, 2)
    for metrics in records + expected:
        assert all(math.isfinite(v) for k, v in metrics.items() if k not in MAY_BE_NAN), metrics
    assert any(metrics["grad_norm"] > 0 for metrics in expected)

    resumed = trainer_of(runs / f"{name}-resumed", objective, update, allocation)
    with checkpoint.generators_kept():
        state, tensors = checkpoint.load(straight.last_checkpoint)
    resumed.load_state_dict(state, tensors)
    for one, other in zip(expected, take(resumed, 2), strict=True):
        assert {k: float(v).hex() for k, v in one.items()} == {k: float(v).hex() for k, v in other.items()}
    torch.set_num_threads(threads)
    one, other = dict(straight.learner.state_tensors()), dict(resumed.learner.state_tensors())
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for part in ("update", "allocator"):
        assert straight.state_dict()[part] == resumed.state_dict()[part]


MAY_BE_NAN = {"completions/mean_terminated_length", "critic/explained_variance"}

REFUSED = [
    (["--objective", "grpo", "--allocation", "apo_filter"], "GRPO compares at least 2 completions of a problem"),
    (["--objective", "rebel", "--group-size", "1"], "REBEL compares at least 2 completions of a problem"),
    (["--update", "gxpo", "--optim.name", "adamw8bit"], "--update.ratio coord_adamw reads them one by one"),
]


@pytest.mark.parametrize("args, text", REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_pairs_that_make_no_sense_are_refused(args, text):
    with pytest.raises(ValueError, match=text):
        configure(args)


def test_eight_bit_moments_go_with_one_ratio_per_tensor():
    config = configure(["--update", "gxpo", "--optim.name", "adamw8bit", "--ratio", "tensor"])
    assert config.update.ratio == "tensor"
