"""Short trainings that a test takes in its own process and the scripts of its ranks take as well."""

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.base import ranks
from support.arguments import SMALL_STEPS
from support.run_folders import without_times
from support.trainers import make_trainer

FLOAT64_STEPS = [*SMALL_STEPS, "--dtype", "float64", "--sample-every", 0]
BFLOAT16_STEPS = ["--dtype", "bfloat16", "--problems-per-step", 2, "--group-size", 2, "--eval-limit", 4, "--lr", 1e-3]
# flags of an update rule, and the publications of one update, the last of them that of the corrective or slow step
MOVES = {
    "sfpo": (["--lookahead", 3], 5),
    "sfpo alpha 0.3": (["--lookahead", 2, "--alpha", 0.3], 4),
    "gxpo": ([], 4),
    "gxpo coord_grad": (["--ratio", "coord_grad", "--active-threshold", 0], 4),
    "gxpo tensor": (["--ratio", "tensor"], 4),
    "gxpo refused": (["--min-effective-multiplier", 99], 4),
}


def run_out_above(model, tokens: int, where: str = "forward", training_only: bool = False):
    """Let a model's forward, or the backward through its last hidden states, fail on more tokens than that."""

    def fail(size):
        if size > tokens:
            raise torch.OutOfMemoryError(f"injected: {size} tokens")

    def hook(module, args, output):
        size, hidden = args[0].numel(), output.last_hidden_state
        if not (hidden.requires_grad or not training_only):
            return
        if where == "forward":
            fail(size)
        elif hidden.requires_grad:
            hidden.register_hook(lambda grad: fail(size))

    return model.base_model.register_forward_hook(hook)


def limited_steps(folder, *flags, limits=(), count=2):
    """Two steps with or without memory running out -> the trainer, their metrics without times."""
    trainer = make_trainer(folder, *FLOAT64_STEPS, *flags)
    models = {
        "policy": trainer.learner.policy,
        "critic": trainer.learner.critic,
        "reference": trainer.learner.reference,
    }
    sampling = trainer.rollout.engine.sample
    hooks = []

    def sample(*args):  # the engine's own forward is not the trainer's business
        for hook in hooks:
            hook.remove()
        hooks.clear()
        found = sampling(*args)
        hooks.extend(run_out_above(models[name].model, tokens, where) for name, tokens, where in limits)
        return found

    trainer.rollout.engine.sample = sample
    metrics = [trainer.step() for _ in range(count)]
    return trainer, [without_times(m) for m in metrics]


def randomly_updated(folder, flags, master, steps=5, bad=()):
    """Steps of an update rule on random gradients, which do not depend on the weights -> trainer, metrics."""
    trainer = make_trainer(folder, *BFLOAT16_STEPS, *flags, "--master", master)
    policy, generator = trainer.learner.policy, torch.Generator().manual_seed(0)
    mask = torch.zeros(len(policy.flat.grads))
    for slot in policy.flat.slots.values():
        mask[slot.offset : slot.offset + slot.numel] = 1.0
    direction, calls = torch.randn(len(mask), generator=generator) * 1e-3 * mask, []

    def accumulate():
        calls.append(1)
        noise = torch.randn(len(mask), generator=generator) * 5e-4 * mask
        policy.flat.grads.copy_(direction + noise)
        if len(calls) in bad:
            policy.flat.grads[0] = torch.inf
        return {"loss": 0.0, "entropy": 1.0}

    metrics = []
    for step in range(steps):
        policy.set_lr(1e-3 / (step + 1))
        metrics.append(trainer.learner.update.update(policy, [accumulate]))
    return trainer, metrics


class Copies(TorchDispatchMode):
    """Counts what is copied into a whole tensor."""

    def __init__(self, into: torch.Tensor):
        super().__init__()
        self.into, self.count = into, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.count += args[0].data_ptr() == self.into.data_ptr() and args[0].numel() == self.into.numel()
        return function(*args, **kwargs or {})


def publications(folder, rule, dtype):
    """One update from random gradients -> whether the weights were the master's at each publication, and copies."""
    options, _ = MOVES[rule]
    trainer = make_trainer(
        folder, *SMALL_STEPS, "--update", rule.split()[0], *options, "--dtype", dtype, "--lr", 1e-3, "--warmup", 0
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


def one_group_steps(folder: Path, *flags):
    """Three steps on a single group of four: with two ranks one of them has nothing."""
    sizes = ["--problems-per-step", 2, "--group-size", 4, "--eval-limit", 2]
    trainer = make_trainer(folder, "--dtype", "float64", *sizes, "--lr", 1e-3, *flags)
    trainer.completions_per_step = 4
    history = [trainer.step() for _ in range(3)]
    return trainer.learner.policy.flat.weights, [
        (m["loss"], m["grad_norm"], m["entropy"], m["reward"]) for m in history
    ]
