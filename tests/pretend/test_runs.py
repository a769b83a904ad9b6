"""Every method and memory feature on the pretended CUDA device: the numbers of the CPU, and few waits for the device.

Half types take the path of a GPU: the head and its loss in Triton, attention over rows of their own lengths, moves of
the flat buffer in Triton.
"""

import pytest

from fastrl.step.learner import Learner
from support.pretend.needed import cuda
from support.trainers import make_trainer

SMALL = ["--problems-per-step", 4, "--eval-limit", 2, "--group-size", 4, "--threads", 1, "--seed", 3, "--steps", 4]
SMALL += ["--rollouts-every", 0, "--sample-every", 0, "--num-profile-completions", 2]
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
MOVES = {"sfpo": 1, "gxpo": 2}


def trainer_on(device: str, folder, flags, dtype="bfloat16"):
    return make_trainer(folder, *SMALL, "--device", device, "--dtype", dtype, *flags)


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_numbers_of_the_cpu_and_waits_for_nothing(name, tmp_path, monkeypatch):
    flags, found = CASES[name], {}
    for device in ("cpu", "cuda:0"):
        trainer = trainer_on(device, tmp_path / device, flags)
        found[device] = [trainer.step() for _ in range(2)]
        for _, tensor in trainer.learner.state_tensors():
            assert tensor.isfinite().all()
    for on_cpu, on_device in zip(*found.values(), strict=True):
        assert on_device["loss"] == pytest.approx(on_cpu["loss"], rel=0.05, abs=2e-3)
        assert on_device["grad_norm"] == pytest.approx(on_cpu["grad_norm"], rel=0.1)
        assert on_device["reward"] == on_cpu["reward"]


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
def test_a_microbatch_waits_for_nothing_and_a_minibatch_little(name, tmp_path, monkeypatch):
    trainer = trainer_on("cuda:0", tmp_path, CASES[name])
    trainer.step()
    counted = Counted(monkeypatch)
    with cuda.watched() as whole:
        trainer.step()
    for watch in counted.microbatches:
        assert watch.waits == []
        assert [event[0] for event in watch.events] == ["upload"]
    scores = 1 if trainer.learner.objective.needs_current else 0  # the present log-probabilities of the whole minibatch
    for watch in counted.minibatches:
        assert len(watch.waits) <= PER_MINIBATCH + scores, watch.waits
    updates = [w for w in whole.waits if "fastrl/weights/" in w or "fastrl/updates/" in w]
    assert len(updates) <= 3 * len(counted.minibatches), updates
