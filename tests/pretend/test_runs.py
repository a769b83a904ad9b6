"""Every method and memory feature on the pretended CUDA device: the numbers of the CPU, and few waits for the device.

Half types take the path of a GPU: the head and its loss in Triton, attention over rows of their own lengths, moves of
the flat buffer in Triton.
"""

import pytest
import torch
from torch.nn.functional import embedding

from fastrl import checkpoint
from fastrl.kernels import parity
from fastrl.models.inputs import Inputs
from fastrl.step.learner import Learner
from support.pretend.needed import cuda
from support.trainers import make_trainer

SMALL = """
    --problems-per-step 4 --group-size 4 --eval-limit 2 --steps 4 --lr 1e-6 --seed 3 --threads 1
    --rollouts-every 0 --sample-every 0 --num-profile-completions 2
""".split()
KL = ["--kl", 0.01]
GXPO = ["--update", "gxpo", "--ratio"]
EXACT = ["--dtype", "float32"]
CASES = {
    "grpo": [],
    "grpo in several microbatches": ["--tokens-per-microbatch", 64],
    "grpo in two minibatches": ["--minibatches", 2, "--entropy", 0.01],
    "grpo with a reference on the host": [*KL, "--reference-on-host"],
    "grpo with sequence ratios": ["--preset", "gspo"],
    "dapo": ["--preset", "dapo"],
    "importance correction": ["--is-correction", "tis"],
    # in float32: Triton's interpreter cuts off what becomes bfloat16, where a GPU rounds
    "sfpo": ["--update", "sfpo", *EXACT],
    "gxpo by coordinate": [*GXPO, "coord_adamw", *EXACT],
    "gxpo by gradient": [*GXPO, "coord_grad", *EXACT],
    "gxpo by tensor": [*GXPO, "tensor", *EXACT],
    "ppo": ["--objective", "ppo", "--group-size", 1, "--problems-per-step", 8],
    "rebel": ["--objective", "rebel", "--group-size", 2],
    "rebel in pairs": ["--objective", "rebel", "--group-size", 2, "--paired"],
    "a*-po": ["--objective", "apo", "--group-size", 1, "--problems-per-step", 8],
    "split master": ["--master", "split"],
    "split master, sfpo": ["--master", "split", "--update", "sfpo"],
    "optimizer on the host": ["--offload", "optimizer"],
    "activations on the host": ["--offload", "optimizer,activations"],
    "bfloat16 gradients": ["--grad-dtype", "bfloat16"],
    "selective checkpoints": ["--checkpoint-activations", "selective"],
    "float64": ["--dtype", "float64"],
    "full checkpoints": ["--checkpoint-activations", "full"],
    "padded rows": ["--attention", "eager"],
}
PER_MICROBATCH = {"padded rows": 1}  # transformers makes a mask, of a number of the host
PER_MINIBATCH = 3  # log-probabilities, sums of metrics, norm of the gradient
# what an update rule asks for once per move: its statistics
MOVES = {"SFPO": 1, "GXPO": 3}


@pytest.fixture(autouse=True)
def fewer_rows_in_the_parity_check(monkeypatch):
    """Triton's interpreter takes seconds for as many as a GPU checks."""
    monkeypatch.setattr(parity, "NUM_ROWS", 32)


def trainer_on(device: str, folder, flags):
    dtype = [] if "--dtype" in flags else ["--dtype", "bfloat16"]
    return make_trainer(folder, *SMALL, "--device", device, *dtype, *flags)


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
        assert len(watch.waits) <= PER_MICROBATCH.get(name, 0), watch.waits
        assert [event[0] for event in watch.events if "models/inputs.py" in event[3]] == ["upload"]
    scores = 1 if trainer.learner.objective.needs_current else 0  # the present log-probabilities of the whole minibatch
    for watch in counted.minibatches:
        assert len(watch.waits) + 1 <= PER_MINIBATCH + scores, watch.waits  # the norm comes later
    of_moves = whole.from_files("fastrl/weights/", "fastrl/updates/", "torch/optim/")
    of_moves = [wait for wait in of_moves if "weights/offload.py" not in wait]  # which is asked to wait
    critic = trainer.learner.num_minibatches if trainer.learner.critic else 0
    most = len(counted.minibatches) + critic + MOVES.get(type(trainer.learner.update).__name__, 0)
    assert len(of_moves) <= most, of_moves


def index_of_the_host(monkeypatch):
    """The positions of the response tokens stay on the CPU."""
    monkeypatch.setattr(Inputs, "at_sources", lambda self, hidden: embedding(self.sources.cpu(), hidden.flatten(0, -2)))


def as_an_array(monkeypatch):
    spread = Inputs.spread
    monkeypatch.setattr(Inputs, "spread", lambda self, x: spread(self, torch.as_tensor(x.detach().numpy())))


@pytest.mark.parametrize(
    "fault, message",
    [(index_of_the_host, "same device"), (as_an_array, "can't convert cuda:0 device type tensor to numpy")],
)
def test_a_mixed_operation_ends_the_run(fault, message, tmp_path, monkeypatch):
    trainer = trainer_on("cuda:0", tmp_path, [])
    fault(monkeypatch)
    with pytest.raises((RuntimeError, TypeError), match=message):
        trainer.step()


def test_a_wait_in_the_loop_of_microbatches_is_seen(tmp_path, monkeypatch):
    trainer = trainer_on("cuda:0", tmp_path, [])
    spread = Inputs.spread
    monkeypatch.setattr(Inputs, "spread", lambda self, x: spread(self, x if x.sum().item() < 0 else x + 0))
    counted = Counted(monkeypatch)
    trainer.step()
    assert all("item at fastrl/" in watch.waits[0] for watch in counted.microbatches), counted.microbatches


@pytest.mark.parametrize("flags", [[], ["--update", "sfpo", "--offload", "optimizer", *EXACT]], ids=["grpo", "sfpo"])
def test_a_run_goes_on_from_its_checkpoint(flags, tmp_path):
    """To the bit: of its weights, and of the numbers of the next step."""
    first = trainer_on("cuda:0", tmp_path / "first", flags)
    first.step()
    first.save()
    expected = first.step()
    second = trainer_on("cuda:0", tmp_path / "second", flags)
    second.load_state_dict(*checkpoint.load(first.last_checkpoint, second.learner.shard_sizes()))
    found = second.step()
    assert all(found[name] == expected[name] for name in ("loss", "grad_norm", "reward", "num_tokens"))
    assert torch.equal(second.learner.policy.flat.weights, first.learner.policy.flat.weights)
