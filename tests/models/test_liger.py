"""Liger's kernels: refused where they cannot run, held against transformers' layers, and taken out again.

Without liger-kernel a stand-in of it patches a model as it does, and computes in torch.
"""

import importlib.util
import os
import sys

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from fastrl.base.log import RunLog
from fastrl.models import liger
from fastrl.models.check import check_model
from fastrl.models.head import token_logprobs
from fastrl.models.inputs import inputs_of, upload
from fastrl.models.liger import LigerKernels, Rotary, passed, tried
from fastrl.models.loading import load_model
from fastrl.run.models import load_models
from fastrl.run.resolve import resolve
from fastrl.settings.run import configure
from support.batches import numbered
from support.families import make_folder

INSTALLED = importlib.util.find_spec("liger_kernel") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAND_IN = '''
import torch
from torch.nn.functional import gelu, silu


class Other:
    """What it puts in place of classes, for models that are loaded later."""


def norm(self, x):
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * scaled.to(x.dtype)


def mlp(self, x):
    return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def rotary(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    return turned(q), turned(k)


def apply_liger_kernel_to_qwen2(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):
    from transformers.models.qwen2 import modeling_qwen2

    assert rope and rms_norm and swiglu and not cross_entropy and not fused_linear_cross_entropy
    modeling_qwen2.apply_rotary_pos_emb = rotary
    modeling_qwen2.Qwen2RMSNorm = modeling_qwen2.Qwen2MLP = Other
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            module.__dict__["forward"] = norm.__get__(module)
        layer.mlp.__dict__["forward"] = mlp.__get__(layer.mlp)
    model.model.norm.__dict__["forward"] = norm.__get__(model.model.norm)
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put the stand-in where Python finds it, with one of its expressions replaced."""
    rotary = modeling_qwen2.apply_rotary_pos_emb

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
            monkeypatch.delitem(sys.modules, name)

    def install(old="", new=""):
        assert old in STAND_IN
        package = tmp_path / "liger_kernel" / "transformers"
        package.mkdir(parents=True)
        (tmp_path / "liger_kernel" / "__init__.py").touch()
        (package / "__init__.py").write_text(STAND_IN.replace(old, new) if old else STAND_IN)
        folder = tmp_path / "liger_kernel-0.8.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: liger_kernel\nVersion: 0.8.5\n")
        monkeypatch.syspath_prepend(tmp_path)
        forget()

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    modeling_qwen2.apply_rotary_pos_emb = rotary


def embedded():
    return load_model("embedded", dtype=torch.float32, device="cpu")


def forwards(model) -> set[str]:
    """Names of what the norms and MLPs compute with."""
    return {
        module.forward.__name__
        for module in model.modules()
        if "Norm" in str(type(module)) or hasattr(module, "up_proj")
    }


def test_it_is_refused_before_the_model_loads(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(ValueError, match=r"needs liger-kernel, .* \(pip install liger-kernel\); use --liger auto"):
        configure(["--liger", "on"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "liger_kernel" or find(name))
    with pytest.raises(ValueError, match="is for a GPU, but the device is cpu; use --liger auto"):
        configure(["--liger", "on", "--device", "cpu"])
    with pytest.raises(ValueError, match="knows exaone4, .*smollm3, but the model is of type gemma3_text"):
        liger.check("gemma3_text", "cuda:0")
    liger.check("qwen3", "cuda:0")
    assert configure([]).memory.liger == configure(["--liger", "auto", "--device", "cpu"]).memory.liger == "auto"


def test_it_is_left_out_without_a_word_on_a_cpu(stand_in):
    stand_in()
    loaded = load_model("embedded", dtype=torch.float32, device="cpu", liger="auto")
    assert loaded.liger is None and loaded.said == ()
    with pytest.raises(ValueError, match="--liger on is for a GPU, but the device is cpu"):
        load_model("embedded", dtype=torch.float32, device="cpu", liger="on")


def test_it_is_put_in_and_taken_out(stand_in):
    stand_in()
    model, plain = embedded().model, modeling_qwen2.apply_rotary_pos_emb
    before, classes = passed(model), (modeling_qwen2.Qwen2RMSNorm, modeling_qwen2.Qwen2MLP)
    kernels, wrong = tried(model)
    assert wrong == "" and len(kernels.forwards) == 13  # two norms and an MLP in each of four layers, and the last norm
    assert forwards(model) == {"norm", "mlp"}
    assert isinstance(modeling_qwen2.apply_rotary_pos_emb, Rotary)
    # what is loaded later has transformers' own classes
    assert (modeling_qwen2.Qwen2RMSNorm, modeling_qwen2.Qwen2MLP) == classes
    with kernels.out():
        assert forwards(model) == {"forward"} and modeling_qwen2.apply_rotary_pos_emb is plain
        for name, value in passed(model).items():
            assert torch.equal(value, before[name])
    assert forwards(model) == {"norm", "mlp"}
    second = embedded().model
    again, _ = tried(second)  # its plain rotation is not the first one's
    assert again.rotary.plain is plain
    again.take_out()
    kernels.take_out()
    assert forwards(model) == forwards(second) == {"forward"} and modeling_qwen2.apply_rotary_pos_emb is plain


FAULTS = {
    "norm": ("self.weight * scaled", "1.2 * self.weight * scaled", "hidden states off by"),
    "activation": ("silu(self", "gelu(self", "hidden states off by"),
    "rotation": ("[-b, a]", "[b, -a]", "hidden states off by"),
    "gradient of weights": (
        "self.weight *",
        "(self.weight + self.weight.detach()) / 2 *",
        "gradients of norms and biases off by",
    ),
    "gradient of inputs": ("silu(self.gate_proj(x))", "silu(self.gate_proj(x.detach()))", "gradients of inputs off by"),
    "error": ("assert rope", "raise RuntimeError('no kernel image')\n    assert rope", "RuntimeError: no kernel image"),
    "late error": ("scaled = x", "raise RuntimeError('ptxas')\n    scaled = x", "RuntimeError: ptxas"),
    "absent": ("apply_liger_kernel_to_qwen2", "apply_liger_kernel_to_qwen1", "AttributeError: module"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_found_and_taken_out(name, stand_in):
    old, new, said = FAULTS[name]
    stand_in(old, new)
    model = embedded().model
    before = passed(model)
    kernels, wrong = tried(model)
    assert kernels is None and wrong.startswith(said)
    for name, value in passed(model).items():
        assert torch.equal(value, before[name])


def test_what_was_done_is_said(stand_in, monkeypatch):
    monkeypatch.setattr(liger, "unfit", lambda kind, device: "")  # of a GPU that is not here
    stand_in("silu(self", "gelu(self")
    kernels, said = liger.choose(embedded().model, "auto")
    assert kernels is None and len(said) == 1
    assert said[0].startswith("liger: WARNING: liger-kernel 0.8.5 is left out: hidden states off by ")
    with pytest.raises(
        ValueError, match="--liger on: liger-kernel 0.8.5 does not give what transformers gives: hidden"
    ):
        liger.choose(embedded().model, "on")
    assert liger.choose(embedded().model, "off") == (None, [])


def test_a_model_says_that_it_has_them(stand_in, monkeypatch):
    monkeypatch.setattr(liger, "unfit", lambda kind, device: "")  # of a GPU that is not here
    stand_in()
    loaded = load_model("embedded", dtype=torch.float32, device="cpu", liger="on", checkpoint="selective")
    assert loaded.liger and loaded.said == ("liger: norms, rotary positions and gated MLPs run on liger-kernel 0.8.5",)
    assert max(check_model(loaded).values()) < 5e-5
    loaded.liger.take_out()


def test_a_run_says_it_and_its_reference_has_them_too(stand_in, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(liger, "unfit", lambda kind, device: "")  # of a GPU that is not here
    stand_in()
    resolved = resolve(configure(["--device", "cpu", "--kl", "0.01"]))
    models = load_models(resolved, RunLog(tmp_path, total_steps=1))
    assert "liger: norms, rotary positions and gated MLPs run on liger-kernel 0.8.5" in capsys.readouterr().out
    assert models.loaded.liger and models.reference
    assert forwards(models.policy.model) == forwards(models.reference.model) == {"norm", "mlp"}
    models.loaded.liger.take_out()


def test_the_check_at_load_compares_with_transformers_own_layers(stand_in):
    stand_in("silu(self", "gelu(self")
    loaded = embedded()
    loaded.liger = LigerKernels(loaded.model)
    with pytest.raises(ValueError, match="has other log-probabilities in its forward in training"):
        check_model(loaded)
    loaded.liger.take_out()


@pytest.fixture
def runs(monkeypatch):
    """Skips where Liger's kernels run neither compiled nor in Triton's interpreter, which this helps to run them."""
    if not INSTALLED:
        pytest.skip("needs liger-kernel")
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None if DEVICE == "cuda" else pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def converted(argument):  # kernels convert numbers, which it leaves as Python's
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return plain(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # theirs is of a CUDA library


@pytest.mark.parametrize(
    "family", [f if f in ("llama", "qwen2") else pytest.param(f, marks=pytest.mark.soak) for f in liger.FAMILIES]
)
def test_liger_gives_what_transformers_gives(family, runs, tmp_path):
    make_folder(tmp_path, family, options=False)
    model = load_model(str(tmp_path), dtype=torch.float32, device=DEVICE).model
    before = passed(model)
    kernels, wrong = tried(model)
    assert wrong == ""
    for name, value in passed(model).items():
        assert (value - before[name]).norm() <= 1e-4 * before[name].norm()
    kernels.take_out()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda" or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA device")
@pytest.mark.skipif(not INSTALLED, reason="needs liger-kernel")
@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_gradients_of_all_parameters_are_those_of_transformers(checkpoint):
    batch, results = numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5]), []
    for wanted in ("off", "on"):
        loaded = load_model("embedded", dtype=torch.bfloat16, device=DEVICE, liger=wanted, checkpoint=checkpoint)
        values, _ = token_logprobs(loaded.model, upload(inputs_of(batch, True), loaded.model.device), num_tokens=16)
        (values * torch.linspace(-1, 2, values.numel(), device=DEVICE).view_as(values)).sum().backward()
        # as one vector: the gradient of keys' biases is zero but for rounding
        results.append([values.detach(), torch.cat([p.grad.flatten() for p in loaded.model.parameters()])])
        if loaded.liger:
            loaded.liger.take_out()
    for plain, fused in zip(*results, strict=True):
        assert (fused - plain).norm() <= 0.1 * plain.norm()
