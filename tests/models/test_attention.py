"""Attention of packed rows: log-probabilities and gradients against padded ones, with a kernel and without."""

import dataclasses
import json
from dataclasses import fields

import pytest
import torch

from fastrl.models.attention import ATTENTION, attention, packed_layers, register, without_cudnn
from fastrl.models.head import token_logprobs
from fastrl.models.inputs import inputs_of
from fastrl.models.loading import load_model
from fastrl.models.packing import pack
from fastrl.models.ragged import Kernel, candidates, definition
from fastrl.step.batching import make_batch
from support.batches import completion, group, numbered

GROUPS = [
    group([1, 2, 3], completion([4, 5]), completion([6]), completion([7, 8, 9])),
    group([10], completion([11, 12]), completion([13, 14])),
]
ROWS = Kernel("by_row", "rows, one by one", definition)


def batch_of(groups):
    return make_batch(groups, lambda rewards, problem: rewards, pad_id=15, max_new_tokens=4)


@pytest.fixture
def sliding(tmp_path):
    """The embedded model with a window of 4 tokens in every other layer."""
    from safetensors.torch import load_file, save_file

    from fastrl.models.loading import model_path

    source = model_path("embedded")
    config = json.loads(open(f"{source}/config.json").read())
    config |= {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(open(f"{source}/{name}", "rb").read())
    save_file(load_file(f"{source}/model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path)


def both(name, checkpoint="none", kernel=None):
    """Log-probabilities, entropies and all gradients of a model on GROUPS, packed and padded."""
    batch = batch_of([group([i % 15 for i in g.problem.prompt_ids], *g.completions) for g in GROUPS])
    results = []
    for packed in (True, False):
        loaded = load_model(name, dtype=torch.float64, device="cpu", checkpoint=checkpoint)
        assert loaded.packs and loaded.said == ()
        loaded.model.set_attn_implementation(register(kernel))
        logprobs, entropy = token_logprobs(loaded.model, inputs_of(batch, packed), num_tokens=15, need_entropy=True)
        weights = torch.linspace(-1, 2, logprobs.numel(), dtype=torch.float64).view_as(logprobs)
        (logprobs * weights + 0.3 * entropy).sum().backward()
        results.append([logprobs.detach(), entropy.detach(), *(p.grad for p in loaded.model.parameters())])
    return results


@pytest.mark.parametrize("kind", ["full", "sliding", "checkpointed"])
def test_packed_equals_padded(kind, sliding, float64_norms):
    checkpoint = "full" if kind == "checkpointed" else "none"
    packed, padded = both(sliding if kind == "sliding" else "embedded", checkpoint)
    assert packed[0].abs().max() > 1
    for one, other in zip(packed, padded, strict=True):
        assert (one - other).abs().max() <= 1e-12


def attended(packing, dtype, device, window, key_heads=2, kernel=None):
    """-> output of packed attention and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    N, d = packing.input_ids.shape[1], 16
    inputs = [torch.randn(1, heads, N, d, generator=generator) for heads in (4, key_heads, key_heads)]
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // key_heads, True
    out, _ = attention(module, *inputs, None, packing=packing, sliding_window=window, kernel=kernel, scaling=0.3)
    (out * torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_their_own_length_equal_padded_ones(window, key_heads):
    packing = pack(numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5]))
    expected = attended(packing, torch.float64, "cpu", window, key_heads)
    actual = attended(packing, torch.float64, "cpu", window, key_heads, ROWS)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 1e-12
    assert expected[0].abs().max() > 1e-1


def test_packed_model_with_rows_of_their_own_length(sliding, float64_norms):
    expected, _ = both(sliding)
    calls = []

    def counted(*args):
        calls.append(args[-1])
        return definition(*args)

    actual, padded = both(sliding, "selective", Kernel("counted", "", counted))
    assert calls == [None, 4] * 2 + [4, None] * 2  # in the forward, and again in the backward, last layer first
    for one, other, third in zip(actual, expected, padded, strict=True):
        assert (one - other).abs().max() <= 1e-12 and (one - third).abs().max() <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernels_attend_as_padded_rows_do(window):
    packing = pack(numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5]))
    on_gpu = dataclasses.replace(packing, **{f.name: getattr(packing, f.name).cuda() for f in fields(packing)})
    rows = attended(on_gpu, torch.bfloat16, "cuda", window)
    truth = attended(on_gpu, torch.float32, "cuda", window)
    kernels = [load() for _, load in candidates("auto", torch.cuda.get_device_capability()[0])]
    assert kernels
    for kernel in kernels:
        found = attended(on_gpu, torch.bfloat16, "cuda", window, kernel=kernel)
        for mine, plain, wanted in zip(found, rows, truth, strict=True):
            assert (mine - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-3, kernel.said


def test_the_window_matters(sliding):
    assert not torch.allclose(both(sliding)[0][0], both("embedded")[0][0], atol=1e-3)


def test_models_that_mix_tokens_elsewhere_are_not_packed():
    loaded = load_model("embedded", dtype=torch.float32, device="cpu")
    assert packed_layers(loaded.model) and loaded.model.config._attn_implementation == ATTENTION
    loaded.model.config.layer_types = ["full_attention", "linear_attention"]
    assert not packed_layers(loaded.model)
    assert not load_model("embedded", dtype=torch.float32, device="cpu", attention="eager").packs


def test_memory_that_runs_out_is_no_reason_to_pad():
    model = load_model("embedded", dtype=torch.float32, device="cpu").model

    def fail(module, args, kwargs):
        raise torch.OutOfMemoryError("injected")

    model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        packed_layers(model)


def test_what_layers_ask_for_is_read_off_a_forward(sliding):
    full, windowed = packed_layers(load_model(sliding, dtype=torch.float32, device="cpu").model)[:2]
    assert full == dataclasses.replace(windowed, window=None) and windowed.window == 4
    assert (full.heads, full.key_heads, full.head_dim, full.value_dim, full.scale) == (4, 4, 32, 32, 32**-0.5)
    assert full.dtype == torch.float32 and full.device == torch.device("cpu")


def test_cudnn_has_no_part_in_attention_on_a_gpu_and_is_left_alone_elsewhere():
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        load_model("embedded", dtype=torch.float32, device="cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        without_cudnn("cuda:1")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_says_what_attends_its_rows():
    loaded = load_model("embedded", dtype=torch.bfloat16, device="cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert loaded.said[-1].startswith("attention: ")
    assert loaded.model.config._attn_implementation.startswith(f"{ATTENTION}_")
    plain = load_model("embedded", dtype=torch.bfloat16, device="cuda", ragged="padded")
    assert plain.said == () and plain.model.config._attn_implementation == ATTENTION
