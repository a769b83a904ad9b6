"""The real vLLM over the trainer's weights, on a CPU: the same tokens, no copies, and no answer from older weights."""

import random
import sys

import numpy
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from fastrl.base.types import EngineError
from fastrl.engine.base import Request, Sampling
from fastrl.engine.hf import HFEngine
from fastrl.engine.vllm import VllmConfig, VllmEngine
from fastrl.engine.vllm_weights import outside
from fastrl.weights.buffer import FlatParams

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
WORDS, TOKENS = 70, 67  # of the model, no multiple of 64; and of its tokenizer
COMMON = dict(
    vocab_size=WORDS,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=1,
    bos_token_id=2,
    pad_token_id=0,
)
FAMILIES = {
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, tie_word_embeddings=False, head_dim=32),
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
}
# the longer ones fill blocks of the cache (32 tokens on a CPU), which is what a stale prefix needs
PROMPTS = [
    [3, 4, 10, 5],
    [20, 21, 22, 23, 24],
    list(range(2, 52)),
    [5] * 40,
    [9, 8, 7],
    list(range(60, 2, -1)),
    [(i * 7 + 3) % 50 for i in range(200)],
    [(i * 5 + 1) % 50 for i in range(200)],
]
GREEDY = Sampling(temperature=0.0, max_new_tokens=32)


def process_state() -> list:
    """What else in the process depends on: generators, threads, precision."""
    return [
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.random.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_float32_matmul_precision(),
    ]


class Pair:
    """A model with both engines over it."""

    def __init__(self, family: str):
        torch.manual_seed(11)
        self.model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(3.0)  # peaked: greedy choices do not hang on rounding
        self.flat = FlatParams(self.model)
        self.before = process_state()
        self.vllm = VllmEngine(
            self.model,
            self.flat,
            VllmConfig(),
            eos_ids=(1,),
            num_tokens=TOKENS,
            max_model_len=256,
            max_num_seqs=64,
            kv_bytes=1 << 30,
        )
        self.after = process_state()
        self.hf = HFEngine(self.model, eos_ids=(1,), pad_id=0, num_tokens=TOKENS)

    def same(self, sampling=GREEDY, prompts=PROMPTS) -> int:
        """How many completions are equal; their log-probabilities are then compared too."""
        requests = [Request(prompt_ids=p, seeds=[7]) for p in prompts]
        with self.vllm.generate_phase():
            ours = self.vllm.sample(requests, sampling)
        equal = 0
        for (a,), (b,) in zip(ours, self.hf.sample(requests, sampling), strict=True):
            if a.token_ids == b.token_ids:
                equal += 1
                assert a.finish_reason == b.finish_reason
                assert max(abs(x - y) for x, y in zip(a.rollout_logprobs, b.rollout_logprobs, strict=True)) <= 1e-4
        return equal

    @torch.no_grad()
    def disturb(self, size: float = 0.35) -> None:
        g = torch.Generator().manual_seed(5)
        noise = torch.randn(self.flat.weights.shape, generator=g)
        self.flat.weights += noise * self.flat.weights.std() * size * (self.flat.weights != 0)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    made = Pair(request.param)
    yield made
    made.vllm.close()


def test_greedy_completions_are_those_of_the_model_before_and_after_an_update(pair):
    assert pair.same() == len(PROMPTS)
    before = [c[0].token_ids for c in pair.hf.sample([Request(prompt_ids=p, seeds=[7]) for p in PROMPTS], GREEDY)]
    pair.disturb()
    stale = pair.same()
    assert stale < len(PROMPTS), "prefixes of the old weights should have shown"
    pair.vllm.weights_changed()
    assert pair.same() == len(PROMPTS)
    after = [c[0].token_ids for c in pair.hf.sample([Request(prompt_ids=p, seeds=[7]) for p in PROMPTS], GREEDY)]
    assert before != after
    optimizer = torch.optim.SGD(pair.model.parameters(), lr=0.05)
    ids = torch.tensor([PROMPTS[-1]])
    pair.flat.zero_grads()
    pair.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    pair.vllm.weights_changed()
    assert pair.same() == len(PROMPTS)


def test_every_parameter_lies_in_the_buffer_and_a_change_copies_nothing(pair):
    model = pair.vllm.runner.get_model()
    assert outside(model, pair.flat) == [] and len(list(model.parameters())) == len(pair.flat.slots)
    held = sum(p.numel() for p in model.parameters())
    assert held <= pair.flat.weights.numel()

    class Moved(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and "view" not in str(function):
                    self.elements += x.numel()
            return out

    with Moved() as moved:
        pair.vllm.weights_changed()
        pair.vllm.drop_prefixes()
    assert moved.elements == 0
    pair.vllm.check_alias()


def test_a_parameter_that_was_put_elsewhere_is_found(pair):
    name, parameter = next(iter(pair.vllm.runner.get_model().named_parameters()))
    there = parameter.data
    parameter.data = there.clone()
    try:
        with pytest.raises(EngineError, match=f"would not follow an update: .*{name}"):
            pair.vllm.check_alias()
    finally:
        parameter.data = there
    pair.vllm.check_alias()


def test_the_runner_and_its_seeds_are_named(pair):
    bases = {cls.__module__ for cls in type(pair.vllm.runner).__mro__}
    name = "second" if "vllm.v1.worker.gpu.model_runner" in bases else "first"
    assert pair.vllm.how == f"{name} model runner, a seed per request"
    assert name == ("second" if "support.second_runner" in sys.modules else "first")


@pytest.mark.parametrize("seeds, temperature", [("request", 0.7), ("request", 1.0), ("request", 1.5), ("step", 0.7)])
def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(pair, monkeypatch, seeds, temperature):
    monkeypatch.setattr(pair.vllm, "seeds", seeds)
    requests = [Request(prompt_ids=p, seeds=[1, 2, 3]) for p in PROMPTS[:3]]
    with pair.vllm.generate_phase():
        groups = pair.vllm.sample(requests, Sampling(temperature=temperature, max_new_tokens=12))
    for prompt, group in zip(PROMPTS, groups, strict=False):
        assert len(group) == 3 and len({tuple(c.token_ids) for c in group}) > 1
        for c in group:
            ids = torch.tensor([prompt + c.token_ids])
            with torch.no_grad():
                logits = pair.model(ids).logits[0, len(prompt) - 1 : -1, :TOKENS].double() / temperature
            truth = logits.log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
            assert (torch.tensor(c.rollout_logprobs).double() - truth).abs().max() < 1e-4


def test_a_seed_is_a_completion(pair):
    """Whoever else is sampled, in whatever order; and groups may differ in size."""
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    with pair.vllm.generate_phase():
        groups = pair.vllm.sample(
            [Request(prompt_ids=p, seeds=list(range(n))) for p, n in zip(PROMPTS[:3], (1, 4, 2), strict=True)], sampling
        )
        again = pair.vllm.sample([Request(prompt_ids=PROMPTS[1], seeds=[2])], sampling)
    assert [len(g) for g in groups] == [1, 4, 2]
    assert again[0][0].token_ids == groups[1][2].token_ids


@pytest.mark.parametrize("seeds", ["request", "step"])
def test_equal_seeds_in_equal_order_repeat_and_leave_no_trace(pair, monkeypatch, seeds):
    monkeypatch.setattr(pair.vllm, "seeds", seeds)

    def sampled(first_seed: int, order: int = 1) -> list[list[list[int]]]:
        requests = [Request(prompt_ids=p, seeds=[first_seed + i for i in range(3)]) for p in PROMPTS[:3]]
        with pair.vllm.generate_phase():
            groups = pair.vllm.sample(requests[::order], Sampling(temperature=1.0, max_new_tokens=12))
        return [[c.token_ids for c in group] for group in groups][::order]

    before = process_state()
    found = sampled(2**62)
    assert process_state() == before
    assert sampled(2**62) == found and sampled(2**62 + 9) != found
    assert all(len({tuple(ids) for ids in group}) > 1 for group in found)
    assert (sampled(2**62, order=-1) == found) == (seeds == "request")


def test_a_completion_ends_with_a_stop_id_and_never_holds_a_word_the_tokenizer_has_not(pair):
    sampling = Sampling(temperature=2.0, max_new_tokens=40)
    with pair.vllm.generate_phase():
        groups = pair.vllm.sample([Request(prompt_ids=p, seeds=list(range(40))) for p in PROMPTS[:2]], sampling)
    completions = [c for g in groups for c in g]
    assert all(max(c.token_ids) < TOKENS for c in completions)
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped and all(c.token_ids[-1] == 1 and 1 not in c.token_ids[:-1] for c in stopped)
    assert all(len(c.token_ids) == 40 for c in completions if c.finish_reason == "length")


def test_a_change_in_the_middle_of_a_generation_is_refused(pair):
    from vllm import SamplingParams

    engine = pair.vllm.llm.llm_engine
    engine.add_request("unfinished", {"prompt_token_ids": PROMPTS[0]}, SamplingParams(max_tokens=8))
    engine.step()
    pair.vllm.weights_changed()
    with pytest.raises(EngineError, match="the weights changed under requests that are not finished"):
        pair.vllm.sample([Request(prompt_ids=PROMPTS[0], seeds=[1])], GREEDY)
    while engine.has_unfinished_requests():
        engine.step()
    assert pair.same(prompts=PROMPTS[:2]) == 2


def test_the_process_is_left_as_it_was(pair):
    assert pair.after == pair.before
