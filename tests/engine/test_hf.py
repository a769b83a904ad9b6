"""The Hugging Face engine: what it samples, what it reports about it, and that nobody else in the batch matters."""

import pytest
import torch

from fastrl.base.types import EngineError
from fastrl.data.arithmetic import Arithmetic
from fastrl.engine.base import Request, Sampling, sampling_seed
from fastrl.engine.hf import HFEngine, draw, nucleus, uniform
from fastrl.engine.vllm_weights import attach
from fastrl.models.head import token_logprobs
from fastrl.models.inputs import Inputs
from fastrl.models.loading import load_model
from fastrl.weights.buffer import FlatParams


@pytest.fixture(scope="module")
def loaded():
    return load_model("embedded", dtype=torch.float64, device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded):
    return [loaded.tokenizer.encode(p.prompt) for p in Arithmetic().load("test")[:12]]


def engine(loaded, **options):
    return HFEngine(
        loaded.model, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, num_tokens=len(loaded.tokenizer), **options
    )


def requests(prompts, size=4):
    return [Request(prompt_ids=p, seeds=[sampling_seed(0, i, k) for k in range(size)]) for i, p in enumerate(prompts)]


def ids(groups):
    return [[c.token_ids for c in group] for group in groups]


def test_reported_logprobs_are_those_of_the_trainer_at_the_sampling_temperature(loaded, prompts):
    assert len({len(p) for p in prompts}) > 3  # left padding is in play
    for temperature in (1.0, 0.7):
        groups = engine(loaded).sample(requests(prompts), Sampling(temperature=temperature, max_new_tokens=10))
        for prompt, group in zip(prompts, groups, strict=True):
            for c in group:
                row = torch.tensor([[*prompt, *c.token_ids]])
                mask = torch.arange(row.shape[1])[None] >= len(prompt)
                with torch.no_grad():
                    inputs = Inputs.of(row, mask)
                    expected, _ = token_logprobs(
                        loaded.model, inputs, inv_temperature=1 / temperature, num_tokens=len(loaded.tokenizer)
                    )
                assert torch.allclose(
                    expected[mask], torch.tensor(c.rollout_logprobs, dtype=torch.float64), atol=2e-6, rtol=0
                )


def test_a_completion_depends_on_its_own_prompt_and_seed_only(loaded, prompts):
    sampling = Sampling(max_new_tokens=10)
    expected = ids(engine(loaded).sample(requests(prompts), sampling))
    assert len({tuple(c) for group in expected for c in group}) > 20  # they do differ from each other
    assert ids(engine(loaded, max_num_seqs=3).sample(requests(prompts), sampling)) == expected
    assert ids(engine(loaded, max_num_seqs=1).sample(requests(prompts), sampling)) == expected
    backwards = engine(loaded).sample(requests(prompts)[::-1], sampling)
    assert ids(backwards)[::-1] == expected
    one = requests(prompts)[5]
    alone = engine(loaded).sample([Request(prompt_ids=one.prompt_ids, seeds=one.seeds[2:3])], sampling)
    assert ids(alone) == [[expected[5][2]]]


def test_it_stops_at_the_end_token_or_at_the_limit(loaded, prompts):
    for limit in (1, 3, 10):
        for group in engine(loaded).sample(requests(prompts), Sampling(max_new_tokens=limit)):
            for c in group:
                ended = [token in loaded.eos_ids for token in c.token_ids]
                assert not any(ended[:-1]) and 1 <= len(c.token_ids) <= limit
                assert c.finish_reason == ("stop" if ended[-1] else "length")
                assert ended[-1] or len(c.token_ids) == limit


def test_greedy_equals_generate_of_transformers(loaded, prompts):
    groups = engine(loaded).sample(requests(prompts, size=1), Sampling(temperature=0, max_new_tokens=10))
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        expected = loaded.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_tokens_beyond_the_tokenizer_are_never_sampled(loaded, prompts):
    few = HFEngine(loaded.model, eos_ids=(0,), pad_id=0, num_tokens=12)
    groups = few.sample(requests(prompts), Sampling(temperature=50.0, max_new_tokens=10))
    sampled = {t for group in groups for c in group for t in c.token_ids}
    assert max(sampled) == 11 and len(sampled) == 12


def test_uniform_is_splitmix64():
    # the first outputs of splitmix64 from state 0, published with the generator
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for t, value in enumerate(outputs):
        assert uniform(torch.tensor([0]), t).item() == (value >> 11) * 2.0**-53
    seeds = torch.tensor([sampling_seed(0, i) for i in range(20000)])
    for t in (0, 7):
        points = uniform(seeds, t)
        assert 0 <= points.min() and points.max() < 1
        # a uniform mean has standard error 1 / sqrt(12 n) = 0.002
        assert abs(points.mean().item() - 0.5) < 0.008
    assert abs(torch.corrcoef(torch.stack([uniform(seeds, 0), uniform(seeds, 1)]))[0, 1]) < 0.03


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(9) * 2
    logits[4] = -torch.inf
    n = 40000
    seeds = torch.tensor([sampling_seed("draw", i) for i in range(n)])
    for temperature in (1.0, 0.5):
        expected = (logits / temperature).softmax(-1)
        token, logprob = draw(logits.expand(n, -1), Sampling(temperature=temperature), seeds, 3)
        counts = torch.bincount(token, minlength=9)
        assert counts[4] == 0
        keep = expected > 0
        chi2 = ((counts - n * expected)[keep] ** 2 / (n * expected[keep])).sum().item()
        assert chi2 < 24.3  # 99.9 % point at 7 degrees of freedom
        assert torch.allclose(logprob, expected.log()[token], atol=1e-5)


def test_nucleus_keeps_the_smallest_sufficient_set():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # 0.5 + 0.3 reaches 0.8 exactly at the second token: 5/8 and 3/8 remain
    kept = nucleus(logprobs, 0.79).exp()
    assert torch.allclose(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]), atol=1e-6)
    assert torch.allclose(nucleus(logprobs, 0.4).exp(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]), atol=1e-6)


def test_sampling_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 0"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="--max-new-tokens must be at least 1, got -1"):
        Sampling(max_new_tokens=-1)
    with pytest.raises(ValueError, match="temperature must be between 0 and 100, got nan"):
        Sampling(temperature=float("nan"))


def test_an_engine_on_another_device_than_the_weights_is_refused():
    flat = FlatParams(torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta")), grad_dtype=None)
    engines = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(EngineError, match="0.weight: vLLM is on cpu, the trained model on meta; .*CUDA_VISIBLE"):
        attach(engines, flat)
