"""The memory plan against tensors that are allocated, numbers worked by hand, and the tables of the design."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from fastrl.memory.parts import GIB, MemorySettings, backward_moments, kv_per_sequence, saved_per_layer, score_moments
from fastrl.memory.plan import CARDS, USABLE, plan_memory
from fastrl.memory.watch import MemoryWatch, outcome
from fastrl.models.critic import ValueModel
from fastrl.models.loading import LoadedModel, parameter_shapes
from fastrl.models.policy import Policy
from fastrl.models.shapes import known_shapes, model_shape
from fastrl.run.resolve import resolve
from fastrl.settings.run import configure
from fastrl.updates import UPDATES
from fastrl.weights.activations import checkpoint_layers
from fastrl.weights.buffer import buffer_elements, layout, round_up
from fastrl.weights.guard import Guard
from fastrl.weights.host_slabs import SLAB
from fastrl.weights.optim import OptimConfig
from support.programs import together
from support.trainers import make_trainer

TINY = dict(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
    max_position_embeddings=4096,
)
ARCHITECTURES = {
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "llama": dict(model_type="llama", tie_word_embeddings=False, head_dim=16),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=True, head_dim=32),
}
RULES = {"single": {}, "sfpo": {"gate": "off"}, "gxpo": {"gate": "off"}}


def tiny(architecture, **changes):
    config = AutoConfig.for_model(**TINY | ARCHITECTURES[architecture] | changes)
    return config, model_shape(architecture, config)


def size(tensor):
    return tensor.numel() * tensor.element_size()


def settings(**changes):
    return MemorySettings(**dict(context=64, tokens_per_microbatch=64, cuda=False, engine="hf") | changes)


class Allocated:
    """A policy after one update from random gradients; what was alive whenever the rule asked for a gradient."""

    def __init__(self, config, optimizer, rule, dtype=torch.bfloat16, grad_dtype=torch.float32):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        loaded = LoadedModel(model, SimpleNamespace(pad_token_id=0), (0,), "", packs=False)
        self.policy = Policy(loaded, OptimConfig(name=optimizer, lr=1e-3), Guard(), grad_dtype=grad_dtype)
        generator = torch.Generator().manual_seed(0)
        gradient = torch.randn(len(self.policy.master), generator=generator) * 1e-3
        self.snapshots = 0

        def accumulate():
            self.snapshots = max(self.snapshots, self.others())
            self.policy.flat.grads.copy_(gradient)
            return {"loss": 0.0, "entropy": 1.0}

        self.policy.flat.grads.copy_(gradient)
        self.policy.optimizer_step(0.0)  # whose state is then there, as in any step but the first
        gc.collect()
        gc.freeze()  # only what the rule makes is seen by the collector from here on
        try:
            rule.update(self.policy, [accumulate])
        finally:
            gc.unfreeze()

    def others(self):
        """Bytes of storages that are neither weights, gradients, master nor state."""
        own = {t.untyped_storage().data_ptr() for _, t in self.policy.state_tensors()}
        own |= {t.untyped_storage().data_ptr() for t in (self.policy.flat.weights, self.policy.flat.grads)}
        found = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum({s.data_ptr(): s.nbytes() for s in found if s.data_ptr() not in own}.values())

    def parts(self):
        state = dict(self.policy.state_tensors())
        flat, master = self.policy.flat, state.pop("master")
        apart = master.data_ptr() != flat.weights.data_ptr()
        return {
            "weights": size(flat.weights),
            "gradients": size(flat.grads),
            "master": apart * size(master),
            "optimizer": sum(map(size, state.values())),
            "snapshots": self.snapshots,
        }


def planned_parts(shape, rule, optimizer, **changes):
    plan = plan_memory(
        shape,
        settings(
            optimizer=optimizer, copies=rule.copies, holds_state=rule.holds_state, dtype=torch.bfloat16, **changes
        ),
    )
    return {name: plan.parts[name]["step"] for name in ("weights", "gradients", "master", "optimizer", "snapshots")}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planned_parts_are_the_allocated_ones(architecture, optimizer, name):
    config, shape = tiny(architecture)
    blocks = {"ratio": "tensor"} if name == "gxpo" and optimizer == "adamw8bit" else {}
    rule = UPDATES[name](**RULES[name], **blocks)
    found = Allocated(config, optimizer, rule).parts()
    assert planned_parts(shape, rule, optimizer) == pytest.approx(found, rel=0.01)
    assert (found["snapshots"] > 0) == (name != "single")


def test_gradients_in_bfloat16_and_a_snapshot_of_the_state_are_planned_as_allocated():
    config, shape = tiny("qwen2")
    rule = UPDATES["sfpo"](gate="off", opt_state="restore")
    found = Allocated(config, "adamw", rule, grad_dtype=torch.bfloat16).parts()
    assert planned_parts(shape, rule, "adamw", grad_dtype=torch.bfloat16) == pytest.approx(found, rel=0.01)
    assert found["gradients"] == found["weights"] and found["snapshots"] == pytest.approx(
        6 * found["weights"], rel=0.01
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_critic_and_reference_of_a_run_are_planned_as_allocated(dtype, tmp_path):
    args = ["--dtype", dtype, "--kl", "0.01", "--problems-per-step", 4, "--eval-limit", 4, "--objective", "ppo"]
    trainer = make_trainer(tmp_path, *args)
    while not trainer.learner.policy.guard.skipped and not trainer.learner.policy.optimizer.state:
        trainer.step()  # the state appears with the first step that is taken
    plan = resolve(configure([*map(str, args), "--tokens-per-microbatch", "1"])).plan
    reference = sum(size(p) for p in trainer.learner.reference.model.parameters())
    assert plan.parts["reference"]["generate"] == pytest.approx(reference, rel=0.01)
    critic = trainer.learner.critic
    held = [critic.flat.weights, critic.flat.grads, *(t for _, t in critic.state_tensors())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert plan.parts["critic"]["generate"] == pytest.approx(sum(storages.values()), rel=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_are_those_of_the_model(architecture):
    config, shape = tiny(architecture)
    assert shape.elements == pytest.approx(buffer_elements(layout(parameter_shapes(config)), 1), abs=1024)
    with torch.device("meta"):
        critic = ValueModel(AutoModelForCausalLM.from_config(config))
    shapes = {name: tuple(p.shape) for name, p in critic.named_parameters()}
    assert shape.critic_elements == pytest.approx(buffer_elements(layout(shapes), 1), abs=1024)
    assert shape.qk_norm == (architecture == "qwen3")


def peak_bytes(call):
    """The most that torch had allocated at a time during call(), C++ temporaries included."""
    call()  # what is made once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_step_allocates_what_is_planned(grad_dtype):
    config, shape = tiny("qwen2")
    policy = Allocated(config, "adamw", UPDATES["single"](), grad_dtype=grad_dtype).policy
    plan = plan_memory(shape, settings(dtype=torch.bfloat16, grad_dtype=grad_dtype))
    assert plan.parts["workspace"]["step"] == pytest.approx(peak_bytes(lambda: policy.optimizer_step(0.0)), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_keeps_what_is_planned(architecture, dtype):
    kept = []
    for layers in (2, 3):
        config, shape = tiny(architecture, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor, storages=storages, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(torch.zeros(1, 64, dtype=torch.int64), use_cache=False)
        kept.append(sum(nbytes for nbytes, _ in storages.values()))
    assert (kept[1] - kept[0]) / 64 == saved_per_layer(shape, settings(dtype=dtype))


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_peak_of_a_backward_is_near_the_planned_one(architecture, checkpoint):
    tokens = 512
    config, shape = tiny(architecture, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    checkpoint_layers(model, checkpoint)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids, gradient = torch.zeros(1, tokens, dtype=torch.int64), torch.ones(1, tokens, 64, dtype=torch.bfloat16)
    found = peak_bytes(lambda: model.base_model(ids, use_cache=False).last_hidden_state.backward(gradient))
    s = settings(context=tokens, checkpoint=checkpoint, dtype=torch.bfloat16)
    moments = backward_moments(shape, s)
    planned = max(moment.activations for moment in moments) + size(gradient)  # the output lives on here
    assert found < 1.02 * planned and planned < 1.25 * found


# the design's tables, GiB on one GPU without sharding, 16384 tokens, full checkpointing
DESIGN = {
    "qwen2.5-1.5b": dict(
        weights=2.9,
        state=(5.8, 2.9, 3.0),
        kv_kib=28,
        D=(15.5, 21.0, 141, 274),
        E=(12.7, 18.1, 148, 281),
        F=(6.8, 18.1, 161, 294),
    ),
    "qwen2.5-7b": dict(
        weights=14.2,
        state=(28.4, 14.2, 14.6),
        kv_kib=56,
        D=(61.5, 81.8, 18, 85),
        E=(47.4, 67.6, 34, 101),
        F=(18.6, 67.6, 67, 134),
    ),
}


@pytest.mark.parametrize("design", "DEF")
@pytest.mark.parametrize("name", DESIGN)
def test_the_designs_tables(name, design):
    shape, expected = known_shapes()[name], DESIGN[name]
    s = MemorySettings(
        context=16384,
        tokens_per_microbatch=16384,
        sequences=256,
        max_num_seqs=256,
        optimizer="adamw8bit",
        master="float32" if design == "D" else "split",
        grad_dtype=torch.bfloat16,
        checkpoint="full",
        offload=("optimizer",) if design == "F" else (),
    )
    plan, (fixed, peak, on_h100, on_h200) = plan_memory(shape, s), expected[design]
    assert plan.parts["weights"]["generate"] / GIB == pytest.approx(expected["weights"], abs=0.05)
    assert plan.parts["master"]["step"] / GIB == pytest.approx(expected["state"][design != "D"], abs=0.05)
    # the design has 2.06 bytes of 8-bit state per parameter; two scales of 4 bytes for 256 elements make 2.03
    more = 2.06 * shape.parameters - plan.parts["optimizer"]["step"]
    assert (plan.parts["optimizer"]["step"] + more) / GIB == pytest.approx(expected["state"][2], abs=0.05)
    assert plan.parts["optimizer"]["step"] / shape.parameters == pytest.approx(2.03125, rel=1e-4)
    at_rest = plan.at("generate") + ("generate" in plan.parts["optimizer"]) * more
    assert kv_per_sequence(shape, s) == expected["kv_kib"] * 1024 * 16384
    assert at_rest / GIB == pytest.approx(fixed, abs=0.05)
    for card, sequences in (("h100", on_h100), ("h200", on_h200)):
        room = USABLE * CARDS[card] * GIB - at_rest
        assert room / kv_per_sequence(shape, s) == pytest.approx(sequences, abs=1)
    # the design has a smaller layer, and a head of 1024 rows without the float32 sum beside bfloat16 gradients
    T, H, inner, V = 16384, shape.hidden, shape.inner, shape.vocab
    activations = 2 * T * H * shape.layers + 2 * T * (5 * inner + 8 * H) + 6 * 1024 * V + 4 * T * H
    others = plan.at("backward") - plan.parts["activations"]["backward"] - plan.parts["logits"]["backward"]
    assert (others + more + activations) / GIB == pytest.approx(peak, abs=0.06)


def test_hand_worked_parts_of_a_large_model():
    """Qwen2.5-1.5B, 1,543,714,304 parameters in 1,543,742,976 elements, on 4 ranks: shards of 385,936,384."""
    shape = known_shapes()["qwen2.5-1.5b"]
    assert shape.parameters == 1_543_714_304 and shape.elements == 1_543_742_976
    s = MemorySettings(context=2048, tokens_per_microbatch=8192, ranks=4, reference=True, copies=1)
    parts = plan_memory(shape, s).parts
    elements = 1_543_745_536  # a multiple of 4096
    assert parts["weights"]["step"] == 2 * elements and parts["gradients"]["step"] == 4 * elements
    assert parts["master"]["step"] == elements == parts["snapshots"]["step"]
    assert parts["optimizer"]["step"] == 2 * elements
    assert parts["reference"]["score"] == 2 * 1_543_714_304
    assert parts["logits"]["backward"] == 4 * 4096 * 151936
    # a layer's MLP takes more than the head where only log-probabilities are asked for
    assert [moment.logits for moment in score_moments(shape, s)] == [0, 64 * 2**20]
    assert parts["activations"]["score"] == 8192 * 2 * (3 * 8960 + 4 * 1536) and parts["logits"]["score"] == 0
    # the shard of the reduce-scatter, and of each 256 of 2^26 elements a norm in float32 and in float64
    assert parts["workspace"]["step"] == elements + 12 * 2**18
    few = replace(s, context=100, tokens_per_microbatch=100)
    assert backward_moments(shape, few)[0].logits == 4 * 100 * 151936
    # less than the embedding's gradient, in bfloat16 and in float32, with which the workspace stays
    assert plan_memory(shape, few).parts["logits"]["backward"] == 4 * 100 * 151936
    assert plan_memory(shape, few).parts["activations"]["backward"] == 6 * 151936 * 1536 + 100 * 2 * 1536
    halves = plan_memory(shape, replace(s, grad_dtype=torch.bfloat16))
    assert halves.parts["logits"]["backward"] == 4 * 4096 * 151936 + 4 * 151936 * 1536


def test_what_update_rules_hold():
    """Bytes per parameter: an anchor of 4; anchor, probe and two moments 16, or with 8-bit moments 4 + 4 + 2."""
    expected = {
        ("--update", "single"): 0,
        ("--update", "sfpo"): 4,
        ("--update", "gxpo"): 16,
        ("--update", "gxpo", "--opt-state", "keep"): 8,
        ("--update", "gxpo", "--ratio", "tensor", "--optim.name", "adamw8bit"): 10,
    }
    for args, per_parameter in expected.items():
        plan = resolve(configure([*args, "--dtype", "bfloat16", "--tokens-per-microbatch", "1"])).plan
        parameters = plan.parts["weights"]["step"] / 2
        assert plan.parts["snapshots"]["step"] / parameters == pytest.approx(per_parameter, rel=0.01), args


def test_what_lies_on_the_host():
    shape = known_shapes()["qwen2.5-1.5b"]
    s = MemorySettings(context=4096, tokens_per_microbatch=16384, reference=True, scores=True, checkpoint="full")
    base = plan_memory(shape, s)
    moved = plan_memory(shape, replace(s, reference_on_host=True, offload=("optimizer", "activations")))
    assert moved.host["reference"] == base.parts["reference"]["step"]
    assert moved.parts["reference"] == {"score": moved.host["reference"]}
    assert "generate" not in moved.parts["master"] | moved.parts["optimizer"]
    less = base.parts["activations"]["backward"] - moved.parts["activations"]["backward"]
    assert less == 16384 * 28 * 2 * 1536
    assert moved.host["activations"] == round_up(less, SLAB)
    kept = replace(s, offload=("activations",), checkpoint="selective")
    # of attention, which autograd does not save and nothing moves; the layer at work does not make its own again
    outputs = 16384 * 27 * (2 * 1536 + 4 * 12)
    more = plan_memory(shape, kept).parts["activations"]["backward"] - moved.parts["activations"]["backward"]
    assert more == outputs and plan_memory(shape, kept).host["activations"] == moved.host["activations"]
    paged = plan_memory(shape, replace(s, optimizer="paged_adamw8bit"))
    assert paged.parts["optimizer"]["step"] == 0 and paged.host["optimizer"] > 2 * shape.parameters


def test_layers_with_a_window_keep_no_more_context():
    config = AutoConfig.for_model(
        **TINY, **ARCHITECTURES["qwen2"], use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    shape = model_shape("windows", config)
    assert shape.windows == (0, 16, 16)
    assert kv_per_sequence(shape, settings(context=100)) == 2 * 2 * 16 * 2 * (100 + 16 + 16)


def test_the_watch_reports_plan_and_measurement(monkeypatch):
    shape = tiny("qwen2")[1]
    plan = plan_memory(shape, settings())
    said, weights = [], torch.zeros(1 << 20)
    gc.collect()
    gc.freeze()
    try:
        alone = MemoryWatch(plan, "cpu", said.append)("train")
        train = MemoryWatch(plan, "cpu", said.append, lambda: [weights])("train")
    finally:
        gc.unfreeze()
    assert train["memory/planned_mib/train"] == pytest.approx(max(map(plan.total, ("backward", "step"))) / 2**20)
    assert train["memory/measured_mib/train"] - alone["memory/measured_mib/train"] == 4 and not said
    monkeypatch.setattr("fastrl.memory.watch.measure", lambda device, held: int(1.06 * plan.total("generate")))
    on_gpu = MemoryWatch(plan, "cuda:0", said.append)
    peaks = iter([3 << 20, 3 << 20, 9 << 20, 5 << 20])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    first = on_gpu("generate")
    assert set(first) == {"memory/planned_mib/generate", "memory/measured_mib/generate", "memory/peak_mib"}
    assert first["memory/peak_mib"] == 3
    on_gpu("generate")
    assert len(said) == 1 and "memory in generate" in said[0] and "+6%" in said[0]
    shares = iter([1.04, 0.5, 1.06])  # less than the plan is no fault
    other = MemoryWatch(plan, "cuda:0", said.append)
    monkeypatch.setattr("fastrl.memory.watch.measure", lambda device, held: int(next(shares) * plan.total("generate")))
    assert other("generate")["memory/peak_mib"] == other("train")["memory/peak_mib"] == 9
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    beside = MemoryWatch(plan, "cuda:0", said.append, others=int(0.02 * plan.total("generate")))
    assert beside("generate")["memory/measured_mib/generate"] == pytest.approx(1.04 * plan.total("generate") / 2**20)
    assert len(said) == 1


def test_the_end_of_a_run_says_the_most_that_each_phase_took():
    steps = [
        {"memory/measured_mib/generate": 2048.0, "memory/planned_mib/generate": 4096.0},
        {"memory/measured_mib/generate": 3072.0, "memory/planned_mib/generate": 4096.0, "loss": 1.0},
        {"memory/measured_mib/train": 6144.0, "memory/planned_mib/train": 5120.0},
    ]
    said = "memory: at most 3.0 of 4.0 GiB planned in generate, 6.0 of 5.0 GiB planned in train"
    assert outcome([{"step": 0}, *steps]) == [said] and outcome([{"step": 0}]) == []


# in a process of its own: a compiler that another test has called leaves tensors that have no storage
LIVE = """
import torch
from fastrl.memory.watch import live_bytes
before = live_bytes()
held = torch.zeros(1 << 20)
views = [held[:10], held.view(1024, 1024)]
assert live_bytes() - before == 4 << 20 and len(views) == 2
"""


def test_live_bytes_count_a_storage_once(tmp_path):
    together(tmp_path, LIVE, count=1)


def test_on_a_gpu_pages_that_were_given_back_cancel(monkeypatch):
    """10 of the device used, 7 by torch's blocks of which 5 was the peak; then 3 of KV in all of torch's counters."""
    from fastrl.memory import watch

    for kv, used in ((0, 10), (3, 10)):  # its pages are not among the used ones
        fake = SimpleNamespace(
            mem_get_info=lambda device, used=used: (100 - used, 100),
            memory_reserved=lambda device, kv=kv: 7 + kv,
            max_memory_allocated=lambda device, kv=kv: 5 + kv,
            reset_peak_memory_stats=lambda device: None,
        )
        monkeypatch.setattr(watch, "torch", SimpleNamespace(cuda=fake))
        assert watch.measure("cuda:0") == 8
