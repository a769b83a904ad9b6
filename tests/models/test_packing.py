"""Packing by hand, and packed log-probabilities and gradients against padded ones."""

import dataclasses
import json
from dataclasses import fields

import pytest
import torch

from fastrl.models import packing as packing_module
from fastrl.models.head import token_logprobs
from fastrl.models.inputs import inputs_of
from fastrl.models.loading import load_model
from fastrl.models.packing import ATTENTION, pack, supports
from fastrl.step.batching import make_batch, select
from support.batches import completion, group, numbered

GROUPS = [
    group([1, 2, 3], completion([4, 5]), completion([6]), completion([7, 8, 9])),
    group([10], completion([11, 12]), completion([13, 14])),
]


def batch_of(groups):
    return make_batch(groups, lambda rewards, problem: rewards, pad_id=15, max_new_tokens=4)


def test_packing_by_hand():
    packing = pack(batch_of(GROUPS))
    # prompts once; the last token of each row predicts nothing
    assert packing.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 10, 11, 13]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 1]]
    real = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 4, 5], [6, 7], [6, 8]]
    assert [row[: len(want)] for row, want in zip(packing.place.tolist(), real, strict=True)] == real
    assert packing.home.tolist() == [0, 1, 2, 3, 13, 14, 15, 16, 21]  # row * 5 + column
    assert packing.place.flatten()[packing.home].tolist() == list(range(9))


def test_any_rows_in_any_order_are_packed_alone():
    batch = select(batch_of(GROUPS), torch.tensor([4, 2, 1]))
    packing = pack(batch)
    # the two rows of the first group share its prompt, which now stands in the second row
    assert packing.input_ids.tolist() == [[10, 13, 1, 2, 3, 7, 8]]
    assert packing.place[2, :3].tolist() == packing.place[1, :3].tolist() == [2, 3, 4]


def test_every_real_token_is_in_its_place():
    batch = numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5])
    packing = pack(batch)
    inputs = batch.lengths() - 1
    assert packing.input_ids.numel() == int((inputs - batch.prompt_lengths).clamp(min=0).sum()) + 3
    for b, n in enumerate(inputs.tolist()):
        places = packing.place[b, :n]
        assert packing.position_ids[0, places].tolist() == list(range(n))
        assert packing.input_ids[0, places[1:]].tolist() == batch.input_ids[b, 1:n].tolist()


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


def both(name, checkpoint="none"):
    """Log-probabilities, entropies and all gradients of a model on GROUPS, packed and padded."""
    batch = batch_of([group([i % 15 for i in g.problem.prompt_ids], *g.completions) for g in GROUPS])
    results = []
    for packed in (True, False):
        loaded = load_model(name, dtype=torch.float64, device="cpu", checkpoint=checkpoint)
        assert loaded.packs
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


def by_row(query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
    """What a kernel over rows of their own lengths computes, row by row: [M, heads, d] -> [M, heads, d]."""
    assert torch.equal(starts, key_starts) and starts.dtype == torch.int32
    bounds, out = starts.tolist(), []
    assert max(b - a for a, b in zip(bounds, bounds[1:], strict=False)) <= longest == longest_key
    for a, b in zip(bounds, bounds[1:], strict=False):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
        far = torch.arange(b - a)[:, None] - torch.arange(b - a)
        mask = (far >= 0) & ((far <= window_size[0]) | (window_size[0] < 0)) & (-far <= window_size[1])
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )
        )
    return torch.cat([x[0].transpose(0, 1) for x in out])


def attended(packing, dtype, device, window, key_heads=2):
    """-> output of packed attention and the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(0)
    N, d = packing.input_ids.shape[1], 16
    inputs = [torch.randn(1, heads, N, d, generator=generator) for heads in (4, key_heads, key_heads)]
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // key_heads, True
    out, _ = packing_module.attention(module, *inputs, None, packing=packing, sliding_window=window, scaling=0.3)
    (out * torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_their_own_length_equal_padded_ones(window, key_heads, monkeypatch):
    packing = pack(numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5]))
    expected = attended(packing, torch.float64, "cpu", window, key_heads)
    monkeypatch.setattr(packing_module, "ragged_kernel", lambda query: by_row)
    actual = attended(packing, torch.float64, "cpu", window, key_heads)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 1e-12
    assert expected[0].abs().max() > 1e-1


def test_rows_by_hand():
    packing = pack(batch_of(GROUPS))
    assert packing.rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 4, 5, 6, 7, 6, 8]
    assert packing.row_starts.tolist() == [0, 4, 7, 12, 14, 16]
    assert packing.rows[packing.row_home].tolist() == list(range(9))


def test_packed_model_with_rows_of_their_own_length(sliding, monkeypatch, float64_norms):
    expected, _ = both(sliding)
    monkeypatch.setattr(packing_module, "ragged_kernel", lambda query: by_row)
    actual, padded = both(sliding, "selective")
    for one, other, third in zip(actual, expected, padded, strict=True):
        assert (one - other).abs().max() <= 1e-12 and (one - third).abs().max() <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_attends_as_padded_rows_do(window, monkeypatch):
    packing = pack(numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5]))
    on_gpu = dataclasses.replace(packing, **{f.name: getattr(packing, f.name).cuda() for f in fields(packing)})
    assert packing_module.varlen_attn() is not None
    kernel = attended(on_gpu, torch.bfloat16, "cuda", window)
    monkeypatch.setattr(packing_module, "ragged_kernel", lambda query: None)
    rows = attended(on_gpu, torch.bfloat16, "cuda", window)
    truth = attended(on_gpu, torch.float32, "cuda", window)
    for mine, plain, wanted in zip(kernel, rows, truth, strict=True):
        assert (mine - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-3


def test_the_window_matters(sliding):
    assert not torch.allclose(both(sliding)[0][0], both("embedded")[0][0], atol=1e-3)


def test_models_that_mix_tokens_elsewhere_are_not_packed():
    loaded = load_model("embedded", dtype=torch.float32, device="cpu")
    assert supports(loaded.model) and loaded.model.config._attn_implementation == ATTENTION
    loaded.model.config.layer_types = ["full_attention", "linear_attention"]
    assert not supports(loaded.model)
    assert not load_model("embedded", dtype=torch.float32, device="cpu", attention="eager").packs


def test_memory_that_runs_out_is_no_reason_to_pad():
    model = load_model("embedded", dtype=torch.float32, device="cpu").model

    def fail(module, args, kwargs):
        raise torch.OutOfMemoryError("injected")

    model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        supports(model)
