"""Weights that an update rule's move writes itself: always the master rounded, and never copied a second time."""

import pytest
import torch

from support.arguments import SMALL_STEPS
from support.programs import together
from support.short_trainings import MOVES, publications
from support.trainers import make_trainer


@pytest.mark.parametrize("rule", MOVES)
def test_a_move_writes_bfloat16_weights_itself(rule, tmp_path):
    same, copies, metrics = publications(tmp_path, rule, "bfloat16")
    _, count = MOVES[rule]
    assert len(same) == count and all(equal for equal, _ in same)
    # each optimizer step is copied into the weights; the move before the last has written them when it is published
    assert [written for _, written in same] == [False] * (count - 2) + [True, False]
    assert copies == count - 1
    if "gxpo" in rule:
        assert metrics["update/refused"] == float("refused" in rule)


@pytest.mark.parametrize("rule", ["sfpo", "gxpo"])
def test_float32_weights_are_the_master_and_nothing_is_copied(rule, tmp_path):
    same, copies, _ = publications(tmp_path, rule, "float32")
    assert all(equal for equal, _ in same) and copies == 0


def test_a_refused_move_leaves_the_anchor_in_master_and_weights(tmp_path):
    trainer = make_trainer(
        tmp_path, *SMALL_STEPS, "--update", "gxpo", "--min-effective-multiplier", 99, "--dtype", "bfloat16"
    )
    policy = trainer.learner.policy
    anchor = policy.master.clone()
    probe = torch.randn(len(anchor), generator=torch.Generator().manual_seed(0)) * 1e-3
    policy.master.add_(2 * probe)
    report = trainer.learner.update.reposition(policy, anchor, probe, probe)
    assert report["update/refused"] == 1.0
    assert torch.equal(policy.master, anchor) and torch.equal(policy.own_weights, anchor.bfloat16())


RANKS = """
import torch
from pathlib import Path
from support.short_trainings import MOVES, publications
from fastrl.base import ranks
ranks.start("cpu")
found = {{rule: publications(Path({folder!r}) / str(ranks.rank()) / rule, rule, "bfloat16")[:2] for rule in MOVES}}
torch.save(found, Path({folder!r}) / f"{{ranks.rank()}}.pt")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


@pytest.mark.slow
@pytest.mark.soak
def test_other_ranks_get_the_weights_that_a_move_has_written(tmp_path):
    together(tmp_path, RANKS.format(folder=str(tmp_path)))
    for rank in range(2):
        for rule, (same, copies) in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            _, count = MOVES[rule]
            assert len(same) == count and all(equal for equal, _ in same), (rank, rule)
            assert copies == count - 1, (rank, rule)
            # the other rank's half arrives only when it is gathered
            assert not any(written for _, written in same), (rank, rule)
