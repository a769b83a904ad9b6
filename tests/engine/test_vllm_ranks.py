"""vLLM on two processes: an engine each, over the weights each holds, in the process group of the trainer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = 3
RUN = """
import sys, torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.trainers import make_trainer
from fastrl.base import ranks

ranks.start("cpu")
group, own = dist.group.WORLD, ranks.rank()
trainer = make_trainer(Path({folder!r}) / str(own), "--engine", "vllm", "--problems-per-step", 6,
                       "--group-size", 4, "--steps", {steps}, "--lr", 1e-3, "--reward-workers", 1, "--eval-limit", 4)
assert {world} == 1 or dist.group.WORLD is group, "the trainer's process group was replaced"
sampled, canary, start = [], [], trainer.learner.policy.flat.weights.clone()
run = trainer.rollout.run
def kept(plan, step):
    groups = run(plan, step)
    sampled.append([(step, g.problem.id, [c.token_ids for c in g.completions]) for g in groups])
    return groups
trainer.rollout.run = kept
for _ in range({steps}):
    trainer.step()
    canary.append(trainer.rollout.canary_metrics["sampling/canary_logp_difference/max"])
engine = trainer.rollout.engine
engine.check_alias()
weights = trainer.learner.policy.flat.weights
engine.close()
found = (ranks.size(), ranks.rank(), ranks.all_sum_(torch.ones(1)).item())  # after the engine
torch.save(dict(sampled=sampled, canary=canary, start=start, weights=weights, found=found), f"{out}.{{own}}")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


def torchrun(world: int, *args: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *args]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.timeout(900)  # three starts of vLLM, where others use the machine too
def test_two_ranks_sample_what_one_does_and_train_like_one(tmp_path):
    """Three steps in float32: the same ids by the same seeds, each rank its share; equal weights on both ranks."""
    found = {}
    for world in (1, 2):
        script, out = tmp_path / f"run{world}.py", tmp_path / f"{world}.pt"
        tests, folder = str(Path(__file__).parents[1]), str(tmp_path / f"runs{world}")
        script.write_text(RUN.format(tests=tests, folder=folder, out=out, world=world, steps=STEPS))
        torchrun(world, script, cwd=tmp_path)
        found[world] = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(world)]
    (alone,), together = found[1], found[2]
    assert [r["found"] for r in together] == [(2, 0, 2.0), (2, 1, 2.0)]  # closing an engine ends no group but its own
    for step in range(STEPS):
        shares = [r["sampled"][step] for r in together]
        assert [len(share) for share in shares] == [3, 3]
        assert alone["sampled"][step][0::2] == shares[0] and alone["sampled"][step][1::2] == shares[1]
    first = [ids for _, _, group in alone["sampled"][0] for ids in group]
    assert len({tuple(ids) for ids in first}) > 6  # the seeds do differ
    assert max(difference for r in together for difference in r["canary"]) < 1e-3
    one, other = (r["weights"] for r in together)
    assert torch.equal(one, other)
    n = min(len(one), len(alone["weights"]))  # two ranks may pad the buffer further
    learned = alone["weights"][:n] - alone["start"][:n]
    # Adam makes much of the rounding of gradients near zero: 1e-4 is found
    assert learned.abs().max() > 1e-4 and (one[:n] - alone["weights"][:n]).norm() < 0.01 * learned.norm()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_two_ranks_make_a_profile_and_stay_two(tmp_path):
    """The engine is closed in the middle of the program, which goes on with collectives."""
    done = torchrun(
        2,
        "-m",
        "fastrl.profile",
        "--engine",
        "vllm",
        "--limit",
        8,
        "--num-completions",
        4,
        "--reward-workers",
        1,
        "--out",
        "profile.jsonl",
        cwd=tmp_path,
    )
    assert done.stdout.count("pass@1") == 1  # rank 0 alone speaks
