"""What ranks put together: means over what was counted, the mismatch of all tokens, and everybody's completions."""

import json
import math

import pytest
import torch

from fastrl.base import ranks
from fastrl.step.metrics import mismatch_of_ranks, sampling_mismatch
from support.programs import ranks as started
from support.programs import run, together
from support.run_folders import rows


def test_means_of_ranks_by_hand(monkeypatch):
    parts = [{"a": (1.0, 6), "b": (1 / 3, 7)}, {"a": (0.0, 2), "c": (5.0, 0)}, {}]
    monkeypatch.setattr(ranks, "gather", lambda own: parts)
    assert ranks.all_means(parts[0]) == {"a": 0.75, "b": 1 / 3}


def test_the_mismatch_of_all_tokens_is_that_of_one_rank_with_all_of_them():
    generator = torch.Generator().manual_seed(0)
    pieces = [0.1 * torch.randn(n, generator=generator) for n in (7, 300, 41)]
    parts = [(sampling_mismatch(piece), len(piece)) for piece in pieces]
    whole, worst = mismatch_of_ranks([*parts, ({}, 0), ({}, None)])
    expected = sampling_mismatch(torch.cat(pieces))
    assert whole.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("median"):
            assert whole[name] == pytest.approx(value, rel=1e-6), name
    for name in ("sampling/mismatch_kl", "sampling/token_mult_prob_error/median"):
        assert worst[name] == max(values[name] for values, _ in parts)
    ratio = "sampling/importance_sampling_ratio/mean"
    assert worst[ratio] == max((values[ratio] for values, _ in parts), key=lambda x: abs(math.log(x)))
    assert mismatch_of_ranks([({}, None)]) == ({}, {}) and mismatch_of_ranks(parts[:1]) == (parts[0][0],) * 2


def test_a_broken_rank_is_not_averaged_away():
    good, bad = sampling_mismatch(torch.zeros(10_000)), sampling_mismatch(torch.tensor([math.nan, 0.0]))
    whole, worst = mismatch_of_ranks([(good, 10_000), (bad, 2)])
    assert math.isnan(worst["sampling/mismatch_kl"]) and math.isnan(whole["sampling/mismatch_kl"])
    assert math.isnan(worst["sampling/token_mult_prob_error/median"])


# whatever is graded counts 1; problems of the second rank are all cut off
SCRIPT = """
from pathlib import Path
import torch
from fastrl.base import ranks
from support.trainers import make_trainer

ranks.start("cpu", 120)
torch.set_num_threads(1)
folder = Path({folder!r})
trainer = make_trainer(folder / f"run{{ranks.rank()}}", "--problems-per-step", 4, "--group-size", 2, "--eval-limit", 2,
                       "--reward", {reward!r}, "--max-new-tokens", 6)
sample = trainer.rollout.sample

def spoilt(*args, **options):
    groups = sample(*args, **options)
    for completion in (c for g in groups for c in g.completions):
        completion.finish_reason = "length" if ranks.rank() else "stop"
    return groups

trainer.rollout.sample = spoilt
metrics = trainer.step()
assert metrics["always/one"] == 1.0 and metrics["always/graded"] == 4.0, metrics
assert metrics["rewards/status/truncated"] == 4
print("counted")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""
REWARD = """
def always(completions, **columns):
    return [0.5] * len(completions), {"one": 1.0, "graded": float(len(completions))}
"""


def test_a_rank_without_any_graded_completion_adds_nothing(tmp_path):
    (tmp_path / "f.py").write_text(REWARD)
    script = SCRIPT.format(folder=str(tmp_path), reward=f"{tmp_path / 'f.py'}:always")
    assert together(tmp_path, script).count("counted") == 2


def test_rollouts_are_those_of_all_ranks_in_the_order_of_one(tmp_path):
    flags = "--problems-per-step 3 --group-size 2 --eval-limit 2 --eval-k 1 --steps 2 --rollouts-every 1 --threads 1"
    run(tmp_path, *flags.split(), "--out", tmp_path / "one")
    codes = [each.wait() for each in started(tmp_path, 2, *flags.split(), "--out", tmp_path / "two")]
    assert codes == [0, 0]
    for step in (1, 2):
        one, two = (
            [json.loads(line) for line in (tmp_path / n / f"rollouts/step_00000{step}.jsonl").read_text().splitlines()]
            for n in ("one", "two")
        )
        assert len(one) == 6 and [row.pop("credit") for row in two] == pytest.approx([row.pop("credit") for row in one])
        if step == 1:  # later weights differ by rounding
            assert one == two
        assert [row["id"] for row in one] == [row["id"] for row in two]
    assert len(rows(tmp_path / "two")) == len(rows(tmp_path / "one"))
