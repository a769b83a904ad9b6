"""Kernels for rows of their own lengths: the definition, the self-test, the adapters, and which of them is taken.

flash-attn needs a GPU. Here stand-ins with the signatures of its generations compute with PyTorch's SDPA.
"""

import dataclasses
import inspect
import math
import sys
from types import ModuleType

import pytest
import torch

from fastrl.models import ragged
from fastrl.models.ragged import Kernel, Layer, candidates, choose, definition, fault, first_sound, flash, varlen
from fastrl.weights.activations import CheckpointPolicy, attention_kept
from support.varlen import by_row, sides

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = Layer(
    heads=4, key_heads=2, head_dim=16, value_dim=16, scale=0.25, window=None, dtype=torch.bfloat16, device=CPU
)
SLIDING = dataclasses.replace(LAYER, window=300)
STARTS = torch.tensor([0, 1, 5, 16], dtype=torch.int32)

IMPORTS = "from support.varlen import by_row, sides\n"
FLASH_2 = """
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):
    assert cu_seqlens_q is cu_seqlens_k and deterministic and max_seqlen_q == max_seqlen_k
    return by_row(q, k, v, cu_seqlens_q, softmax_scale, sides(window_size, causal))
"""
FLASH_3 = """
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):
    assert cu_seqlens_q is cu_seqlens_k and deterministic and max_seqlen_q == max_seqlen_k
    return by_row(q, k, v, cu_seqlens_q, softmax_scale, sides(window_size, causal))
"""
FLASH_4 = """
def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False,
):
    assert cu_seqlens_q is cu_seqlens_k and deterministic and max_seqlen_q == max_seqlen_k
    assert window_size == (-1, -1) or min(window_size) >= 0  # -1 on one side alone is a window of none
    out = by_row(q, k, v, cu_seqlens_q, softmax_scale, sides(window_size, causal))
    return out, out.new_zeros(q.shape[1], q.shape[0])
"""
STAND_INS = {
    2: ("flash_attn-2.8.3", "flash_attn/__init__.py", FLASH_2),
    3: ("flash_attn_3-3.0.0", "flash_attn_interface.py", FLASH_3),
    4: ("flash_attn_4-4.0.0b36", "flash_attn/cute/__init__.py", FLASH_4),
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put stand-ins of flash-attn where Python finds them: their code and what their installation leaves."""

    def forget():
        for name in [name for name in sys.modules if name.startswith("flash_attn")]:
            del sys.modules[name]

    def install(*generations, code=None):
        for generation in generations:
            distribution, path, text = STAND_INS[generation]
            name, version = distribution.split("-")
            folder = tmp_path / f"{distribution}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(IMPORTS + text if code is None else code)
        monkeypatch.syspath_prepend(tmp_path)
        forget()

    yield install
    forget()


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, heads, 16, generator=generator, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]


def computed(attend, scale=0.3, window=None):
    """-> output and gradients for three rows of 1, 4 and 11 tokens."""
    leaves = inputs()
    out = attend(*leaves, STARTS, 11, scale, window)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def same(one, other):
    return all(x.shape == y.shape and (x - y).abs().max() <= 1e-12 for x, y in zip(one, other, strict=True))


def test_definition_by_hand():
    value = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(5, 1, 1)
    alike, starts = torch.zeros(5, 1, 1), torch.tensor([0, 2, 5])
    # scores are equal, so each token has the mean of what it sees: rows of two and of three tokens
    assert definition(alike, alike, value, starts, 3, 1.0, None).flatten().tolist() == [
        1,
        1.5,
        4,
        6,
        pytest.approx(28 / 3),
    ]
    assert definition(alike, alike, value, starts, 3, 1.0, 2).flatten().tolist() == [1, 1.5, 4, 6, 12]
    # the second token of a row: scores 0 and log 3 of its two keys, so weights 1/4 and 3/4
    query, key = torch.ones(2, 1, 1), torch.tensor([0.0, math.log(3) / 2]).view(2, 1, 1)
    out = definition(query, key, torch.tensor([4.0, 8.0]).view(2, 1, 1), torch.tensor([0, 2]), 2, 2.0, None)
    assert out.flatten().tolist() == [4.0, pytest.approx(7.0)]


def test_key_heads_are_shared_in_order():
    query, key, value = torch.zeros(1, 4, 1), torch.zeros(1, 2, 1), torch.tensor([[[5.0], [7.0]]])
    assert definition(query, key, value, torch.tensor([0, 1]), 1, 1.0, None).flatten().tolist() == [5, 5, 7, 7]


def bleeding(q, k, v, starts, longest, scale, window):
    return definition(q, k, v, starts[[0, -1]], scale=scale, longest=longest, window=window)


def without_key_gradient(q, k, v, *rest):
    return definition(q, k.detach() + 0 * k, v, *rest)


FAULTS = {
    "scale": (LAYER, lambda q, k, v, s, n, scale, w: definition(q, k, v, s, n, 1.1 * scale, w), "output off by"),
    "rows": (LAYER, bleeding, "output off by"),
    "window": (SLIDING, lambda q, k, v, s, n, scale, w: definition(q, k, v, s, n, scale, w + 1), "output off by"),
    "no window": (SLIDING, lambda q, k, v, s, n, scale, w: definition(q, k, v, s, n, scale, None), "output off by"),
    "gradient": (LAYER, without_key_gradient, "gradient of keys off by 1 of its norm"),
    "nan": (LAYER, lambda *x: definition(*x) * torch.nan, "output off by nan"),
    "error": (LAYER, lambda *x: 1 / 0, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_self_test_finds(name):
    layer, attend, said = FAULTS[name]
    assert fault(attend, layer).startswith(said)


@pytest.mark.parametrize("layer", [LAYER, SLIDING, dataclasses.replace(LAYER, scale=2.0, dtype=torch.float16)])
def test_rounding_passes_the_self_test(layer, monkeypatch):
    assert fault(definition, layer) == ""
    monkeypatch.setattr(ragged, "DIFFERENCE", 0.01)  # three times less than is allowed
    assert fault(definition, layer) == ""


def test_memory_that_runs_out_is_no_fault():
    def attend(*args):
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        fault(attend, LAYER)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("generation", [2, 3, 4])
def test_every_flash_attn_is_asked_for_the_definition(generation, window, installed):
    installed(generation)
    attend = flash(ragged.FLASH[generation][1])
    assert same(computed(attend, window=window), computed(definition, window=window))
    assert fault(attend, LAYER) == fault(attend, SLIDING) == ""


def names(wanted, capability):
    return [name for name, _ in candidates(wanted, capability)]


def test_the_best_that_is_installed_is_tried_first(installed):
    own = f"PyTorch's varlen_attn, torch {torch.__version__}"
    assert names("auto", 9) == names("torch", 9) == [own] and names("flash", 9) == []
    installed(2, 3, 4)
    assert names("auto", 8) == ["flash-attn 2.8.3", own]
    assert names("auto", 9) == ["flash-attn 3.0.0", "flash-attn 4.0.0b36", "flash-attn 2.8.3", own]
    assert names("flash", 10) == names("flash", 12) == ["flash-attn 4.0.0b36", "flash-attn 2.8.3"]
    kernel, reasons = first_sound({LAYER, SLIDING}, candidates("auto", 9))
    assert (kernel.key, kernel.said, reasons) == ("fa3", "flash-attn 3.0.0", [])


def test_one_that_does_not_load_or_is_wrong_is_named_and_the_next_is_taken(installed):
    installed(3, code="raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEa')")
    installed(4, code=IMPORTS + FLASH_4.replace("sides(window_size, causal)", "(None, 0)"))
    installed(2)
    kernel, reasons = first_sound({SLIDING}, candidates("auto", 9))
    assert kernel.key == "fa2" and len(reasons) == 2
    assert reasons[0] == "flash-attn 3.0.0 does not load: undefined symbol: _ZN3c104cuda9SetDeviceEa"
    assert reasons[1].startswith("flash-attn 4.0.0b36 is left out: output off by ")
    assert first_sound({SLIDING}, [])[0] is None


def test_every_layer_is_tried():
    def full(q, k, v, starts, longest, scale, window):
        return definition(q, k, v, starts, longest, scale, None)

    kernels = [("one", lambda: Kernel("one", "one", full))]
    assert first_sound({LAYER}, kernels)[0] is not None
    assert first_sound({LAYER, SLIDING}, kernels)[0] is None


def stand_in_varlen(monkeypatch, version):
    """torch.nn.attention.varlen as it was in a version of PyTorch, computing with SDPA."""

    def compute(q, k, v, starts, scale, window, shared):
        assert shared or q.shape[1] == k.shape[1]
        return by_row(q, k, v, starts, scale, sides(window, False))

    def since_2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        return compute(query, key, value, cu_seq_q, scale, window_size, enable_gqa)

    def in_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return compute(query, key, value, cu_seq_q, scale, window_size, False)

    def in_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        return compute(query, key, value, cu_seq_q, None, (-1, 0 if is_causal else -1), False)

    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = {"2.13": since_2_12, "2.11": in_2_11, "2.10": in_2_10}[version]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    return module.varlen_attn


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("version", ["2.13", "2.11"])
def test_pytorch_is_asked_for_the_definition(version, window, monkeypatch):
    stand_in_varlen(monkeypatch, version)
    assert same(computed(varlen(), window=window), computed(definition, window=window))
    assert fault(varlen(), LAYER) == fault(varlen(), SLIDING) == ""


def test_pytorch_2_10_has_neither_a_scale_nor_a_window(monkeypatch):
    stand_in_varlen(monkeypatch, "2.10")
    assert same(computed(varlen(), scale=0.25), computed(definition, scale=0.25))  # 16 ** -0.5
    assert fault(varlen(), LAYER) == ""
    said = "ValueError: this version has neither a scale nor a window"
    assert fault(varlen(), SLIDING) == fault(varlen(), dataclasses.replace(LAYER, scale=0.3)) == said


def test_the_stand_in_has_the_signature_of_the_pytorch_that_is_here(monkeypatch):
    real = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if here < (2, 12):
        pytest.skip(f"torch {torch.__version__} is older")
    mine = stand_in_varlen(monkeypatch, "2.13")
    known = inspect.signature(real).parameters
    assert {name: p.kind for name, p in inspect.signature(mine).parameters.items()}.items() <= {
        name: p.kind for name, p in known.items()
    }.items()


def test_what_no_kernel_takes_is_said(monkeypatch):
    on_gpu = dataclasses.replace(LAYER, device=CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))

    def said(**change):
        kernel, lines = choose({dataclasses.replace(on_gpu, **change)}, "auto")
        assert kernel is None and len(lines) == 1
        return lines[0].removeprefix("attention: rows are padded, which is slower: ")

    assert said(dtype=torch.float32) == "kernels take bfloat16 and float16, but the weights are torch.float32"
    assert said(head_dim=12) == "kernels take heads of up to 256 numbers in steps of 8, but these have 12"
    assert said(head_dim=264) == "kernels take heads of up to 256 numbers in steps of 8, but these have 264"
    assert said(value_dim=8) == "kernels take values as wide as keys, but here they have 8 and 16 numbers"
    assert said() == "kernels need compute capability 8.0, but this GPU has 7.5"


def test_rows_are_padded_on_a_cpu_without_a_word():
    assert choose({LAYER}, "auto") == choose({dataclasses.replace(LAYER, device=CUDA)}, "padded") == (None, [])
    with pytest.raises(ValueError, match="--ragged flash cannot be had: .* the device is cpu; use --ragged auto"):
        choose({LAYER}, "flash")


def test_what_is_asked_for_by_name_and_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(ragged, "unfit", lambda layer: "")  # of a GPU that is not here
    with pytest.raises(ValueError, match="--ragged flash cannot be had: none is installed; use --ragged auto"):
        choose({LAYER}, "flash")


def test_what_was_chosen_and_what_was_not_is_said(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(ragged, "unfit", lambda layer: "")  # of a GPU that is not here
    installed(3, code="")
    installed(2)
    kernel, lines = choose({LAYER}, "flash")
    assert kernel.key == "fa2" and lines[1] == "attention: flash-attn 2.8.3"
    assert lines[0].startswith(
        "attention: WARNING: flash-attn 3.0.0 does not load: module 'flash_attn_interface' has no"
    )


@pytest.mark.parametrize(
    "operator, kept",
    [
        ("flash_attn::_flash_attn_varlen_forward", True),
        ("flash_attn_3::fwd", True),
        ("torch_attn::_varlen_attn", True),
        ("aten::_scaled_dot_product_flash_attention", True),
        ("aten::mm", False),
    ],
)
def test_selective_checkpointing_keeps_what_operators_of_attention_give(operator, kept):
    class Operator:
        def name(self):
            return operator

    assert (attention_kept(None, Operator()) == CheckpointPolicy.MUST_SAVE) is kept


ON_GPU = [(generation, window) for generation in (2, 3, 4, "varlen") for window in (None, 300)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("which, window", ON_GPU)
def test_kernels_of_this_gpu_give_the_definition(which, window, dim):
    layer = Layer(12, 2, dim, dim, dim**-0.5, window, torch.bfloat16, torch.device("cuda"))
    key = which if which == "varlen" else f"fa{which}"
    loaded = [load() for _, load in candidates("auto", torch.cuda.get_device_capability()[0])]
    kernels = {kernel.key: kernel for kernel in loaded}
    if key not in kernels:
        pytest.skip(f"{key} is not installed, or not for this GPU")
    assert fault(kernels[key].attend, layer) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attn_repeats_its_gradient_on_this_gpu():
    kernels = [load() for _, load in candidates("flash", torch.cuda.get_device_capability()[0])]
    if not kernels:
        pytest.skip("flash-attn is not installed")
    starts = torch.arange(0, 16 * 512 + 1, 512, device="cuda", dtype=torch.int32)
    leaves = [torch.randn(16 * 512, n, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (12, 2, 2)]
    for kernel in kernels:
        found = [torch.autograd.grad(kernel.attend(*leaves, starts, 512, 0.1, None).sum(), leaves) for _ in range(3)]
        assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(found[0], again, strict=True)), kernel.said
