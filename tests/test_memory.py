"""The memory plan against the tensors that a run allocates."""

import math

import pytest
import torch
from helpers import make_trainer
from transformers import AutoConfig

from fastrl.build import configure, memory_plan
from fastrl.critic import critic_shapes
from fastrl.flat import buffer_elements, layout
from fastrl.memory import plan_memory
from fastrl.model import model_path, parameter_shapes


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_the_allocated_ones(optimizer, dtype, tmp_path):
    args = ["--optim.name", optimizer, "--dtype", dtype, "--kl", "0.01", "--problems-per-step", 4, "--eval-limit", 4]
    args += ["--objective", "ppo", "--critic.optim.name", optimizer]
    trainer = make_trainer(tmp_path, *args)
    while not trainer.policy.guard.skipped and not trainer.policy.optimizer.state:
        trainer.step()  # the state appears with the first step that is taken
    config = AutoConfig.from_pretrained(model_path("embedded"))
    shapes = parameter_shapes(config)
    slots = layout(shapes)
    plan = plan_memory(
        config, num_parameters=sum(map(math.prod, shapes.values())),
        buffer_elements=buffer_elements(slots, 1), critic_elements=buffer_elements(layout(critic_shapes(config)), 1),
        critic_optimizer=optimizer, dtype=getattr(torch, dtype),
        grad_dtype=torch.float32, optimizer=optimizer, reference=True, tokens_per_microbatch=1, checkpointing=False,
        ranks=1,
    )  # fmt: skip

    def size(tensor):
        return tensor.numel() * tensor.element_size()

    flat, state = trainer.policy.flat, dict(trainer.policy.state_tensors())
    own_master = trainer.policy.master.data_ptr() != flat.weights.data_ptr()
    assert plan.parts["weights"] == size(flat.weights) and plan.parts["gradients"] == size(flat.grads)
    assert plan.parts["master"] == (size(trainer.policy.master) if own_master else 0)
    moments = sum(size(t) for name, t in state.items() if name.startswith("optimizer."))
    assert plan.parts["optimizer"] == pytest.approx(moments, rel=0.01)
    reference = sum(size(p) for p in trainer.reference.model.parameters())
    assert plan.parts["reference"] == pytest.approx(reference, rel=0.01)
    critic, state = trainer.critic.flat, dict(trainer.critic.state_tensors())
    held = [critic.weights, critic.grads, *(t for name, t in state.items() if own_master or name != "master")]
    assert plan.parts["critic"] == pytest.approx(sum(map(size, held)), rel=0.01)
    assert trainer.policy.optimizer.param_groups[0]["params"][0].data_ptr() == trainer.policy.master.data_ptr()


def test_a_chunk_of_logits_is_counted():
    config = AutoConfig.from_pretrained(model_path("embedded"))
    settings = dict(num_parameters=1, buffer_elements=1, dtype=torch.bfloat16, grad_dtype=torch.float32, ranks=1,
                    optimizer="adamw", reference=False, checkpointing=True)  # fmt: skip
    for tokens, rows in ((100, 100), (9000, 4096)):
        plan = plan_memory(config, **settings, tokens_per_microbatch=tokens, logit_rows=4096)
        assert plan.parts["logits"] == 4 * rows * config.vocab_size
    assert plan_memory(config, **settings, tokens_per_microbatch=100).parts["logits"] == 0


def test_what_update_rules_hold(tmp_path):
    """Bytes per parameter: an anchor of 4; anchor, probe and two moments 16, or with 8-bit moments 4 + 4 + 2."""
    expected = {
        ("--update", "single"): 0, ("--update", "sfpo"): 4, ("--update", "gxpo"): 16,
        ("--update", "gxpo", "--opt-state", "keep"): 8,
        ("--update", "gxpo", "--ratio", "tensor", "--optim.name", "adamw8bit"): 10,
    }  # fmt: skip
    for args, per_parameter in expected.items():
        config = configure(args)
        plan = memory_plan(config, torch.bfloat16, 1)
        parameters = plan.parts["weights"] / 2
        assert plan.parts["update"] / parameters == pytest.approx(per_parameter, rel=0.01), args
