"""Every method and memory feature on the pretended CUDA device: the numbers of the CPU, and few waits for the device.

Half types take the path of a GPU: the head and its loss in Triton, attention over rows of their own lengths, moves of
the flat buffer in Triton.
"""

import pytest

from fastrl.kernels import parity
from fastrl.step.learner import Learner
from support.pretend.needed import cuda
from support.trainers import make_trainer

SMALL = [
    "--problems-per-step",
    4,
    "--eval-limit",
    2,
    "--group-size",
    4,
    "--threads",
    1,
    "--seed",
    3,
    "--steps",
    4,
    "--lr",
    1e-6,
]
SMALL += ["--steps", 4, "--lr", 1e-6, "--rollouts-every", 0, "--sample-every", 0, "--num-profile-completions", 2]
KL = ["--kl", 0.01]
GXPO = ["--update", "gxpo", "--ratio"]
CASES = {
    "grpo": [],
    "grpo in several microbatches": ["--tokens-per-microbatch", 64],
    "grpo in two minibatches": ["--minibatches", 2, "--entropy", 0.01],
    "grpo with a reference on the host": [*KL, "--reference-on-host"],
    "grpo with sequence ratios": ["--preset", "gspo"],
    "dapo": ["--preset", "dapo"],
    "importance correction": ["--is-correction", "tis"],
    "sfpo": ["--update", "sfpo"],
    "gxpo by coordinate": [*GXPO, "coord_adamw"],
    "gxpo by gradient": [*GXPO, "coord_grad"],
    "gxpo by tensor": [*GXPO, "tensor"],
    "ppo": ["--objective", "ppo", "--group-size", 1, "--problems-per-step", 8],
    "rebel": ["--objective", "rebel", "--group-size", 2],
    "rebel in pairs": ["--objective", "rebel", "--group-size", 2, "--paired"],
    "a*-po": ["--objective", "apo", "--group-size", 1, "--problems-per-step", 8],
    "split master": ["--master", "split"],
    "split master, sfpo": ["--master", "split", "--update", "sfpo"],
    "split master, gxpo": ["--master", "split", *GXPO, "coord_adamw"],
    "optimizer on the host": ["--offload", "optimizer"],
    "activations on the host": ["--offload", "optimizer,activations"],
    "bfloat16 gradients": ["--grad-dtype", "bfloat16"],
    "selective checkpoints": ["--checkpoint-activations", "selective"],
    "full checkpoints": ["--checkpoint-activations", "full"],
    "padded rows": ["--attention", "eager"],
    "sgpo": ["--allocation", "sgpo"],
}
PER_MINIBATCH = 3  # log-probabilities, sums of metrics, norm of the gradient
# what an update rule asks for once per move: its statistics
MOVES = {"SFPO": 1, "GXPO": 2}


@pytest.fixture(autouse=True)
def fewer_rows_in_the_parity_check(monkeypatch):
    """Triton's interpreter takes seconds for as many as a GPU checks."""
    monkeypatch.setattr(parity, "NUM_ROWS", 32)


def trainer_on(device: str, folder, flags, dtype="bfloat16"):
    return make_trainer(folder, *SMALL, "--device", device, "--dtype", dtype, *flags)


class Counted:
    """Waits of a learner's calls: of all microbatches, and of what a minibatch adds."""

    def __init__(self, monkeypatch):
        self.microbatches, self.minibatches = [], []
        for name, into in (("forward", self.microbatches), ("accumulate", self.minibatches)):
            monkeypatch.setattr(Learner, name, self.counting(getattr(Learner, name), into))

    def counting(self, method, into):
        def counted(*args, **kwargs):
            with cuda.watched() as watch:
                result = method(*args, **kwargs)
            into.append(watch)
            return result

        return counted


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_numbers_of_the_cpu_and_hardly_waits(name, tmp_path, monkeypatch):
    """The first step is compared: what is sampled in the second depends on the last bits of the first."""
    on_cpu = trainer_on("cpu", tmp_path / "cpu", CASES[name]).step()
    trainer = trainer_on("cuda:0", tmp_path / "cuda", CASES[name])
    assert trainer.learner.policy.flat.weights.is_cuda
    on_device = trainer.step()
    assert on_device["loss"] == pytest.approx(on_cpu["loss"], rel=0.05, abs=5e-3)
    assert on_device["grad_norm"] == pytest.approx(on_cpu["grad_norm"], rel=0.1)
    assert on_device["reward"] == on_cpu["reward"]
    counted = Counted(monkeypatch)
    with cuda.watched() as whole:
        trainer.step()
    assert all(tensor.isfinite().all() for _, tensor in trainer.learner.state_tensors())
    for watch in counted.microbatches:
        assert watch.waits == []
        assert [event[0] for event in watch.events] == ["upload"]
    scores = 1 if trainer.learner.objective.needs_current else 0  # the present log-probabilities of the whole minibatch
    for watch in counted.minibatches:
        assert len(watch.waits) + 1 <= PER_MINIBATCH + scores, watch.waits  # the norm comes later
    of_moves = whole.from_files("fastrl/weights/", "fastrl/updates/", "torch/optim/")
    most = len(counted.minibatches) + MOVES.get(type(trainer.learner.update).__name__, 0)
    assert len(of_moves) <= most, of_moves
