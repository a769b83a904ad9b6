"""Weights that an update rule's move writes itself: always the master rounded, and never copied a second time."""

import pytest
import torch
from helpers import make_trainer
from program import together
from test_sfpo import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.base import ranks

# publications of one update, the last of them that of the corrective or slow step
RULES = {
    "sfpo": (["--lookahead", 3], 5),
    "sfpo alpha 0.3": (["--lookahead", 2, "--alpha", 0.3], 4),
    "gxpo": ([], 4),
    "gxpo coord_grad": (["--ratio", "coord_grad", "--active-threshold", 0], 4),
    "gxpo tensor": (["--ratio", "tensor"], 4),
    "gxpo refused": (["--min-effective-multiplier", 99], 4),
}


class Copies(TorchDispatchMode):
    """Counts what is copied into a whole tensor."""

    def __init__(self, into: torch.Tensor):
        super().__init__()
        self.into, self.count = into, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.count += args[0].data_ptr() == self.into.data_ptr() and args[0].numel() == self.into.numel()
        return function(*args, **kwargs or {})


def updated(folder, rule, dtype):
    """One update from random gradients -> whether the weights were the master's at each publication, and copies."""
    options, _ = RULES[rule]
    trainer = make_trainer(
        folder, *SMALL, "--update", rule.split()[0], *options, "--dtype", dtype, "--lr", 1e-3, "--warmup", 0
    )
    policy, generator = trainer.learner.policy, torch.Generator().manual_seed(0)
    policy.set_lr(1e-3)
    gradients = iter([torch.randn(len(policy.flat.grads), generator=generator) * 1e-3 for _ in range(8)])
    padding = torch.ones(len(policy.flat.grads), dtype=torch.bool)
    for slot in policy.flat.slots.values():
        padding[slot.offset : slot.offset + slot.numel] = False
    same, publish = [], policy.publish

    def accumulate():
        policy.flat.grads.copy_(next(gradients)).masked_fill_(padding, 0.0)
        return {"loss": 0.0, "entropy": 1.0}

    def watched(**how):
        before = policy.flat.weights.clone()
        publish(**how)
        rounded = torch.empty_like(before)
        rounded.chunk(ranks.size())[ranks.rank()].copy_(policy.master)
        ranks.gather_shards(rounded)
        same.append((torch.equal(policy.flat.weights, rounded), torch.equal(policy.flat.weights, before)))

    policy.publish = watched
    with Copies(policy.own_weights) as copies:
        metrics = trainer.learner.update.update(policy, [accumulate])
    return same, copies.count, metrics


@pytest.mark.parametrize("rule", RULES)
def test_a_move_writes_bfloat16_weights_itself(rule, tmp_path):
    same, copies, metrics = updated(tmp_path, rule, "bfloat16")
    _, publications = RULES[rule]
    assert len(same) == publications and all(equal for equal, _ in same)
    # each optimizer step is copied into the weights; the move before the last has written them when it is published
    assert [written for _, written in same] == [False] * (publications - 2) + [True, False]
    assert copies == publications - 1
    if "gxpo" in rule:
        assert metrics["update/refused"] == float("refused" in rule)


@pytest.mark.parametrize("rule", ["sfpo", "gxpo"])
def test_float32_weights_are_the_master_and_nothing_is_copied(rule, tmp_path):
    same, copies, _ = updated(tmp_path, rule, "float32")
    assert all(equal for equal, _ in same) and copies == 0


def test_a_refused_move_leaves_the_anchor_in_master_and_weights(tmp_path):
    trainer = make_trainer(tmp_path, *SMALL, "--update", "gxpo", "--min-effective-multiplier", 99,
                           "--dtype", "bfloat16")  # fmt: skip
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
from test_trained import RULES, updated
from fastrl.base import ranks
ranks.start("cpu")
found = {{rule: updated(Path({folder!r}) / str(ranks.rank()) / rule, rule, "bfloat16")[:2] for rule in RULES}}
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
            _, publications = RULES[rule]
            assert len(same) == publications and all(equal for equal, _ in same), (rank, rule)
            assert copies == publications - 1, (rank, rule)
            # the other rank's half arrives only when it is gathered
            assert not any(written for _, written in same), (rank, rule)
