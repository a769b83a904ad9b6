"""The flat buffers of a tied Qwen2 with biases and an untied Llama: layout by hand, views, gradients, zero padding."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastrl.models.head import token_logprobs
from fastrl.models.inputs import Inputs
from fastrl.weights.buffer import FlatParams, layout, slot_name
from fastrl.weights.optim import OptimConfig, make_optimizer

# 4 heads of 8 and 2 key-value heads: q 32 rows, k and v 16 rows each; 70 words are padded to 128 rows
SIZES = dict(
    vocab_size=70,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
QWEN_LAYER = {
    # tensor: (elements from the start of the layer, shape)
    "self_attn.qkv_proj.weight": (0, (64, 32)),  # 2048 elements
    "self_attn.qkv_proj.bias": (2048, (64,)),
    "self_attn.o_proj.weight": (3072, (32, 32)),
    "mlp.gate_up_proj.weight": (4096, (96, 32)),  # 3072
    "mlp.down_proj.weight": (7168, (32, 48)),  # 1536, rounded up to 2048
    "input_layernorm.weight": (9216, (32,)),
    "post_attention_layernorm.weight": (10240, (32,)),
}  # 11264 a layer
IDS = torch.tensor([[3, 69, 5, 12, 40, 7], [0, 1, 33, 33, 2, 68]])


def make(family="qwen", dtype=torch.float32, tied=None):
    torch.manual_seed(0)
    if family == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied is not False))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=bool(tied)))
    for name, parameter in model.named_parameters():  # fresh biases are all zero and norms all one
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model.to(dtype)


def backward(model, ids=IDS):
    model(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum().backward()


def padding(flat):
    """[P] bool: elements that belong to no parameter, found from the slots alone."""
    free = torch.ones(flat.weights.numel(), dtype=torch.bool)
    for slot in flat.slots.values():
        numel = SIZES["vocab_size"] * slot.shape[1] if slot.shape[0] == 128 else slot.numel
        free[slot.offset : slot.offset + numel] = False
    return free


def test_layout_of_a_tied_qwen_by_hand():
    flat = FlatParams(make())
    expected = {"model.embed_tokens.weight": (0, (128, 32))}  # 4096 elements
    for i in range(2):
        start = 4096 + 11264 * i
        expected |= {f"model.layers.{i}.{n}": (start + at, shape) for n, (at, shape) in QWEN_LAYER.items()}
    expected["model.norm.weight"] = (26624, (32,))
    assert {name: (slot.offset, slot.shape) for name, slot in flat.slots.items()} == expected
    assert flat.weights.numel() == flat.grads.numel() == 27648
    attn = "model.layers.1.self_attn"
    for leaf in ("weight", "bias"):
        assert flat.slots[f"{attn}.qkv_proj.{leaf}"].parts == tuple(f"{attn}.{p}_proj.{leaf}" for p in "qkv")
    mlp = "model.layers.0.mlp"
    assert flat.slots[f"{mlp}.gate_up_proj.weight"].parts == (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")


def test_layout_of_an_untied_llama_by_hand():
    flat = FlatParams(make("llama"))
    # 4096 embedding + 2 x 10240 (a layer has no biases) + 1024 norm, then the head
    assert flat.slots["model.norm.weight"].offset == 4096 + 2 * 10240
    head = flat.slots["lm_head.weight"]
    assert (head.offset, head.shape, flat.weights.numel()) == (25600, (128, 32), 29696)
    assert not any("bias" in name for name in flat.slots)


def test_order_of_parts_does_not_depend_on_the_order_of_names():
    rows = {"v": 3, "k": 2, "q": 5}
    slots = layout({f"a.self_attn.{p}_proj.weight": (n, 4) for p, n in rows.items()} | {"lm_head.weight": (65, 4)})
    assert slots["a.self_attn.qkv_proj.weight"].parts == tuple(f"a.self_attn.{p}_proj.weight" for p in "qkv")
    assert slots["a.self_attn.qkv_proj.weight"].shape == (10, 4)
    assert (slots["lm_head.weight"].offset, slots["lm_head.weight"].shape) == (1024, (128, 4))
    assert slot_name("x.layers.3.mlp.up_proj.weight") == ("x.layers.3.mlp.gate_up_proj.weight", 1)
    assert slot_name("x.layers.3.mlp.down_proj.weight") == ("x.layers.3.mlp.down_proj.weight", 0)


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_fused_rows_are_the_models_tensors(family):
    model = make(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = FlatParams(model)
    for name, slot in flat.slots.items():
        assert slot.offset % 1024 == 0
        joined = torch.cat([before[part] for part in slot.parts])
        view = flat.view(flat.weights, slot)
        assert torch.equal(view[: len(joined)], joined), name
        assert not view[len(joined) :].any()
    assert torch.equal(flat.weights != 0, ~padding(flat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_the_model_computes_the_same_bits(family, dtype):
    model = make(family, dtype)
    with torch.no_grad():
        before = model(IDS).logits
        flat = FlatParams(model)
        after = model(IDS).logits
    assert torch.equal(before, after) and before.std() > 0
    assert flat.weights.dtype == dtype and flat.grads.dtype == torch.float32


def test_buffer_and_model_are_one():
    model = make()
    flat = FlatParams(model)
    q = model.model.layers[0].self_attn.q_proj
    # row 2, column 5 of q; row 1 of v comes after 32 rows of q and 16 of k
    flat.weights[4096 + 2 * 32 + 5] = 7.0
    assert q.weight[2, 5].item() == 7.0
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[1, 3] = -9.0
        model.model.layers[0].self_attn.k_proj.bias[4] = 11.0
    assert flat.weights[4096 + (32 + 16 + 1) * 32 + 3].item() == -9.0
    assert flat.weights[4096 + 2048 + 32 + 4].item() == 11.0
    with torch.no_grad():
        before = model(IDS).logits
        flat.weights.mul_(1.25)
        assert not torch.equal(model(IDS).logits, before)
    assert model.lm_head.weight.data_ptr() == flat.weights.data_ptr()  # tied: the head is the embedding


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_gradients_add_up_in_the_buffer(family):
    model = make(family)
    alone = copy.deepcopy(model)
    flat = FlatParams(model)
    for times in (1, 2):
        backward(model, IDS)
        backward(alone, IDS)
        for name, slot in flat.slots.items():
            wanted = torch.cat([alone.get_parameter(part).grad for part in slot.parts])
            torch.testing.assert_close(flat.view(flat.grads, slot)[: len(wanted)], wanted, rtol=1e-6, atol=1e-7)
            assert wanted.abs().max() > 1e-4, f"{name} after {times}"
        assert not flat.grads[padding(flat)].any()
    flat.zero_grads()
    assert not flat.grads.any() and not model.model.norm.weight.grad.any()


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    model = make(dtype=torch.bfloat16)
    alone = copy.deepcopy(model)
    flat = FlatParams(model)
    summed, rounded = 0.0, 0.0
    for ids in (IDS, IDS.flip(0, 1), (IDS + 1) % 70):
        backward(model, ids)
        alone.zero_grad()
        backward(alone, ids)
        grad = alone.model.layers[0].mlp.up_proj.weight.grad
        summed, rounded = summed + grad.float(), rounded + grad
    view = flat.view(flat.grads, flat.slots["model.layers.0.mlp.gate_up_proj.weight"])[48:]
    assert torch.equal(view, summed) and not torch.equal(view, rounded.float())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_the_heads_gradient_in_place_is_autograds(family, grad_dtype):
    """Of bfloat16 weights; 68 of the 70 words belong to the tokenizer."""
    model = make(family, torch.bfloat16)
    alone = copy.deepcopy(model).float()
    flat = FlatParams(model, grad_dtype=grad_dtype)
    assert flat.grads.dtype == grad_dtype
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    for m, in_place in ((alone, False), (model, True)):
        ids = IDS.clamp(max=67)
        values, _ = token_logprobs(m, Inputs.of(ids, mask), num_tokens=68, head_grad_in_place=in_place)
        values.sum().backward()
    name = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    got, wanted = flat.view(flat.grads, flat.slots[name]).float(), alone.get_parameter(name).grad
    assert (got[:70] - wanted).norm() < 0.02 * wanted.norm()
    assert not got[70:].any()
    if family == "llama":
        assert not got[68:].any() and got[:68].any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_stays_zero_through_steps_with_weight_decay(dtype):
    model = make(dtype=dtype)
    flat = FlatParams(model, ranks=2)
    before = flat.weights.clone()
    master = flat.weights.float()
    optimizer = make_optimizer(OptimConfig(lr=1e-2, weight_decay=0.1), master)
    for _ in range(3):
        flat.zero_grads()
        backward(model)
        master.grad = flat.grads
        optimizer.step()
        flat.weights.copy_(master)
    free = padding(flat)
    assert free.sum() == flat.weights.numel() - sum(p.numel() for p in model.parameters()) > 0
    assert not flat.weights[free].any() and not master[free].any() and not flat.grads[free].any()
    assert (flat.weights != before)[~free].float().mean() > 0.9


def test_owns():
    model = make()
    flat = FlatParams(model)
    assert all(flat.owns(p) for p in model.parameters()) and flat.owns(model.lm_head.weight[3:])
    others = (flat.grads, flat.weights.clone(), flat.weights[flat.weights.numel() :], torch.ones(3))
    assert not any(flat.owns(tensor) for tensor in others)
    assert flat.owns(flat.weights[-1:])
    # what lies right behind the buffer is somebody else's
    memory = torch.zeros(flat.weights.numel() + 4)
    flat.weights = memory[:-4]
    assert flat.owns(memory[-5:]) and not flat.owns(memory[-4:])


@pytest.mark.parametrize("ranks, numel", [(1, 27648), (2, 28672), (3, 27648), (4, 28672), (7, 28672), (8, 32768)])
def test_ranks_divide_the_buffer(ranks, numel):
    model = make()
    flat = FlatParams(model, ranks=ranks)  # 27 blocks of 1024
    assert flat.weights.numel() == flat.grads.numel() == numel
    assert {len(shard) % 1024 for shard in flat.weights.chunk(ranks)} == {0}
    assert len(flat.weights.chunk(ranks)) == ranks


def test_mixed_dtypes_are_refused():
    model = make()
    model.model.layers[1].mlp.down_proj.bfloat16()
    wanted = r"must share torch.float32 on cpu, but not \['model.layers.1.mlp.down_proj.weight'\]"
    with pytest.raises(ValueError, match=wanted):
        FlatParams(model)


def test_gradients_are_never_narrower_than_weights():
    for dtype, grad_dtype, expected in (
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ):
        model = torch.nn.Sequential(torch.nn.Linear(3, 5, dtype=dtype))
        assert FlatParams(model, grad_dtype=grad_dtype).grads.dtype == model[0].bias.grad.dtype == expected
