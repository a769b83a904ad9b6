"""Liger's kernels: refused where they cannot run, asked for what is wanted, and giving what transformers gives."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from fastrl.models import liger
from fastrl.models.loading import load_model
from fastrl.settings.run import configure

INSTALLED = importlib.util.find_spec("liger_kernel") is not None


def test_it_is_refused_before_the_model_loads(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        configure(["--liger"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "liger_kernel" or find(name))
    with pytest.raises(ValueError, match="is for a GPU, but the device is cpu"):
        configure(["--liger", "--device", "cpu"])
    with pytest.raises(ValueError, match="knows llama, qwen2, qwen3, but the model is of type gemma3_text"):
        liger.check("gemma3_text", "cuda:0")
    liger.check("qwen3", "cuda:0")


def test_layers_are_asked_for_and_losses_are_not(monkeypatch):
    asked = []
    transformers = ModuleType("liger_kernel.transformers")
    transformers.apply_liger_kernel_to_qwen2 = lambda **how: asked.append(how)
    package = ModuleType("liger_kernel")
    package.transformers = transformers
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    model = load_model("embedded", dtype=torch.float32, device="cpu", liger=True).model
    layers = {"rope": True, "rms_norm": True, "swiglu": True}
    assert asked == [{**layers, "cross_entropy": False, "fused_linear_cross_entropy": False, "model": model}]
    load_model("embedded", dtype=torch.float32, device="cpu")
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="needs liger-kernel and a CUDA device")
def test_hidden_states_and_gradients_are_those_of_transformers():
    ids = torch.arange(90, device="cuda").view(3, 30) % 15
    results = []
    for kernels in (False, True):  # in this order: rotary positions stay patched
        model = load_model("embedded", dtype=torch.float32, device="cuda", liger=kernels).model
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)).sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters())])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
