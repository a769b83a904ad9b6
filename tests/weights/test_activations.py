"""What layers keep for their backward: the same gradients in every mode, and fewer bytes from mode to mode."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastrl.models.head import token_logprobs
from fastrl.models.inputs import inputs_of
from fastrl.models.loading import load_model
from fastrl.settings.run import configure
from fastrl.step.batching import make_batch
from fastrl.weights.activations import saved_on_host
from fastrl.weights.buffer import FlatParams
from fastrl.weights.host_slabs import SLAB, Forward, HostSlabs
from support.batches import completion, group

MODES = ["none", "selective", "full"]


@pytest.fixture(scope="module")
def batch():
    groups = [
        group([(3 * i + g) % 15 for i in range(40)], *(completion([(i + j) % 15 for i in range(30)]) for j in range(2)))
        for g in range(3)
    ]
    return make_batch(groups, lambda rewards, problem: rewards, pad_id=15, max_new_tokens=40)


def live_storages() -> dict[int, int]:
    """Address -> bytes of every tensor that Python knows."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def trained_once(batch, mode: str, packed: bool, hooks=nullcontext):
    """-> all gradients, and the bytes that the forward leaves for the backward beside weights and inputs."""
    model = load_model("embedded", dtype=torch.float64, device="cpu", checkpoint=mode).model
    flat = FlatParams(model, grad_dtype=torch.float64)
    gc.collect()
    before, saved = live_storages(), []  # autograd's own tensors are no objects of Python unless hooks make them so
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), hooks(flat.weights):
        values, _ = token_logprobs(model, inputs_of(batch, packed), num_tokens=15)
    gc.collect()
    kept = live_storages() | {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    saved.clear()
    (values * torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)).sum().backward()
    return flat.grads, sum(size for place, size in kept.items() if place not in before)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_the_same_gradient_from_fewer_bytes(packed, batch, float64_norms):
    found = {mode: trained_once(batch, mode, packed) for mode in MODES}
    expected, most = found["none"]
    assert expected.abs().max() > 1e-2
    for mode in MODES[1:]:
        assert (found[mode][0] - expected).abs().max() <= 1e-12 * expected.abs().max(), mode
    none, selective, full = (found[mode][1] for mode in MODES)
    assert none > 3 * selective and selective > 1.5 * full
    # beside full: of each of the 4 layers attention's output and a float32 number per head and position
    rows, columns, width, heads = len(batch), batch.input_ids.shape[1] - 1, 128, 4
    assert selective - full == pytest.approx(4 * rows * columns * (8 * width + 8 * heads), rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_saved_activations_go_to_the_host_and_weights_stay(mode, batch, float64_norms, monkeypatch):
    expected, _ = trained_once(batch, mode, packed=True)
    moved, weights, slabs = [], [], HostSlabs(locked=False)
    put = Forward.put

    def hooks(flat_weights):
        weights.append(flat_weights.untyped_storage().data_ptr())
        return saved_on_host(flat_weights, slabs)

    monkeypatch.setattr(Forward, "put", lambda self, x: moved.append(x) or put(self, x))
    actual, _ = trained_once(batch, mode, packed=True, hooks=hooks)
    assert torch.equal(actual, expected)
    assert len(moved) >= 4  # the layers' inputs at least
    assert all(x.untyped_storage().data_ptr() not in weights and x.numel() >= 1024 for x in moved)
    size = sum(x.numel() * x.element_size() for x in moved)
    assert len(slabs.unused) == -(-size // SLAB)  # all are back, and no more than it takes


def test_selective_needs_an_attention_kernel():
    with pytest.raises(ValueError, match="--attention eager has none; use --attention sdpa"):
        configure(["--checkpoint-activations", "selective", "--attention", "eager"])
    with pytest.raises(ValueError, match="here it is called --checkpoint-activations"):
        configure(["--gradient-checkpointing"])
