"""Two ranks on the pretended device, which both take for theirs: gradients, moves and weights are those of one rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrl.kernels import parity
from support.pretend.needed import cuda
from support.programs import free_port
from support.trainers import make_trainer

SCRIPT = """
import sys
import support.pretend.cuda
import torch
from pathlib import Path
from fastrl.base import ranks
from fastrl.kernels import parity
from support.trainers import make_trainer

folder, flags = Path(sys.argv[1]), sys.argv[2:]
parity.NUM_ROWS = 32  # Triton's interpreter takes seconds for as many as a GPU checks
ranks.start("cuda:0")
trainer = make_trainer(folder / str(ranks.rank()), "--device", "cuda:0", *flags)
metrics = [trainer.step() for _ in range(2)]
torch.save((metrics, trainer.learner.policy.flat.weights.cpu()), folder / f"rank-{ranks.rank()}.pt")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""
FLAGS = "--problems-per-step 4 --group-size 4 --eval-limit 2 --threads 1 --seed 3 --dtype float32 --rollouts-every 0"
RULES = {
    "sfpo, optimizer on the host": "--update sfpo --offload optimizer",
    "split master": "--dtype bfloat16 --master split",
}


def on_two_ranks(folder: Path, flags: list[str]) -> list[tuple[list[dict], torch.Tensor]]:
    there = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", SCRIPT, str(folder), *flags]
    processes = [subprocess.Popen(command, env=os.environ | there | {"RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(250) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_two_ranks_are_one(name, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "NUM_ROWS", 32)
    flags = [*FLAGS.split(), *RULES[name].split()]
    trainer = make_trainer(tmp_path / "one", "--device", "cuda:0", *flags)
    alone, weights = trainer.step(), trainer.learner.policy.flat.weights
    trainer.step()
    assert cuda.pretended.allocated() > 0
    (first, own), (_, others) = on_two_ranks(tmp_path, flags)
    assert torch.equal(own, others)
    tight = "split" not in name
    assert first[0]["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4 if tight else 0.05)
    assert first[0]["reward"] == alone["reward"]
    if tight:
        # more ranks, more padding behind the parameters
        assert (own[: len(weights)] - weights.cpu()).abs().max() < 1e-3 * weights.abs().max().item()
