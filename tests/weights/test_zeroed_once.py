"""How often the gradient buffer is zeroed: once for each gradient that is accumulated, whatever the update rule."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.arguments import SMALL_STEPS
from support.trainers import make_trainer

CLEARING = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor}


class Zeroed(TorchDispatchMode):
    """Counts operations that fill a whole buffer, by the buffer's name."""

    def __init__(self, **buffers: torch.Tensor):
        super().__init__()
        self.buffers, self.counts = buffers, dict.fromkeys(buffers, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for name, buffer in self.buffers.items():
            whole = function in CLEARING and args[0].numel() == buffer.numel()
            self.counts[name] += whole and args[0].data_ptr() == buffer.data_ptr()
        return result


# flags of a run, and gradients of the policy in one step; every minibatch of a critic has one
CASES = {
    "single": (["--minibatches", 2], 2),
    "sfpo": (["--update", "sfpo", "--lookahead", 2, "--minibatches", 2], 6),
    "gxpo": (["--update", "gxpo", "--minibatches", 2], 6),
    "critic": (["--objective", "ppo", "--minibatches", 2, "--epochs-per-batch", 2], 4),
}


@pytest.mark.parametrize("case", CASES)
def test_once_for_each_gradient(case, tmp_path):
    flags, gradients = CASES[case]
    trainer = make_trainer(tmp_path, *SMALL_STEPS, *flags, "--lr", 1e-4)
    learner = trainer.learner
    trainer.step()
    with Zeroed(**{name: model.flat.grads for name, model in learner.trained.items()}) as zeroed:
        metrics = trainer.step()
    assert metrics["num_backward_passes"] == 2 * gradients and metrics["grad_norm"] > 0
    expected = {"policy": gradients, "critic": 2} if learner.critic else {"policy": gradients}
    assert zeroed.counts == expected


def test_memory_comes_back_without_being_written(tmp_path):
    policy = make_trainer(tmp_path, *SMALL_STEPS).learner.policy
    policy.rest()
    with Zeroed(grads=policy.flat.grads) as zeroed:
        policy.wake()
        assert zeroed.counts == {"grads": 0} and policy.flat.grads.untyped_storage().nbytes() > 0
        policy.zero_grad()
    assert zeroed.counts == {"grads": 1} and not policy.flat.grads.any()
