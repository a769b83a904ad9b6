"""Writes step-3 beside this file; needed only for a new VERSION: python tests/golden/checkpoint/make.py"""

import shutil
from pathlib import Path

import torch

from fastrl import checkpoint

HERE = Path(__file__).parent

shutil.rmtree(HERE / "step-3", ignore_errors=True)
checkpoint.seed_generators(11)
torch.rand(1)
checkpoint.save(
    HERE,
    3,
    write_model=lambda path: (path / "config.json").write_text("{}"),
    keep=2,
    tensors=[
        ("master", torch.tensor([1.0, -2.0, 0.5, 0.0])),
        ("optimizer.exp_avg", torch.tensor([0.25, 0.0, 0.0, -1.0])),
        ("optimizer.step", torch.tensor(3.0)),
    ],
    state={"step": 3, "config": {"seed": 11}, "identity": {"reference": ""}},
)
