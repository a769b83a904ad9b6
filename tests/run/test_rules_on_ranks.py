"""Every update rule on two ranks: it goes on from a save to the bit, and from one that a single rank has written.

What a rule keeps from step to step (`state_tensors`) is cut among ranks like the weights.
"""

import pytest
import torch

from fastrl.updates import UPDATES
from support.cases import mostly_later
from support.programs import together

SCRIPT = """
import torch
from pathlib import Path
from fastrl import checkpoint
from fastrl.base import ranks
from support.arguments import SMALL_STEPS
from support.trainers import make_trainer

folder, rule, saved = Path({folder!r}), {rule!r}, {saved!r}
ranks.start("cpu")
torch.set_num_threads(1)
flags = [*SMALL_STEPS, "--update", rule, "--lr", 1e-3, "--warmup", 0, "--dtype", "float64"]


def state(trainer):
    own = dict(trainer.learner.state_tensors())
    return own | {{"weights": trainer.learner.policy.flat.weights.clone()}}


def new(name):
    return make_trainer(folder / f"{{name}}{{ranks.rank()}}", *flags)


first = new("first")
if saved:  # by another number of ranks
    found, tensors = checkpoint.load(Path(saved), first.learner.shard_sizes())
    first.load_state_dict(found, tensors)
    sizes = {{len(t) for name, t in first.learner.state_tensors() if name.startswith(("master", "update."))}}
    assert sizes == {{len(first.learner.policy.master)}}, sizes
else:
    first.step()
first.folder = folder / "saved"
first.save()
torch.save(state(first), folder / f"at-{{ranks.rank()}}.pt")
first.step()
expected = state(first)
second = new("second")
second.load_state_dict(*checkpoint.load(first.last_checkpoint, second.learner.shard_sizes()))
second.step()
got = state(second)
assert got.keys() == expected.keys()
for name, tensor in expected.items():
    assert torch.equal(tensor.cpu(), got[name].cpu()), name
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", mostly_later(list(UPDATES), *(name for name, cls in UPDATES.items() if cls.keeps)))
def test_a_rule_goes_on_with_what_it_keeps(rule, tmp_path):
    for count, saved in ((1, ""), (2, ""), (2, str(tmp_path / "1" / "saved" / "checkpoints" / "step-1"))):
        folder = tmp_path / f"{count}{'-from-1' if saved else ''}"
        folder.mkdir()
        together(folder, SCRIPT.format(folder=str(folder), rule=rule, saved=saved), count=count)
    one = torch.load(tmp_path / "1" / "at-0.pt", weights_only=True)
    two = [torch.load(tmp_path / "2-from-1" / f"at-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, whole in one.items():
        if name == "master" or name.startswith("update."):
            assert torch.equal(torch.cat([own[name] for own in two])[: len(whole)], whole), name
