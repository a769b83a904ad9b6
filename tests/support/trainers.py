"""The trainer of a command line, built inside a test, and copies of what it has learnt."""

from pathlib import Path

import torch

from fastrl.base.log import RunLog
from fastrl.run.build import build
from fastrl.run.resolve import resolve
from fastrl.run.sampling import open_rewards
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.step.trainer import Trainer


def make_trainer(folder: Path, *args: object, stop_requested=lambda: False) -> Trainer:
    """The trainer of `python -m fastrl.train ARGS` on the embedded task, writing into `folder`."""
    argv = [str(EMBEDDED_RECIPE), "--out", str(folder), *map(str, args)]
    config = parse(TrainConfig, argv, AXES)
    log = RunLog(folder, total_steps=config.run.steps)
    log.open()
    return build(resolve(config), log, open_rewards(config), stop_requested)


def weights_and_state(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of the policy's master and of its optimizer's states."""
    return [t.clone() for _, t in trainer.learner.policy.state_tensors()]
