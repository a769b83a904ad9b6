"""What the head costs at the size of a real model: products, their precision, launches, memory; on the meta device.

Nothing is computed: shapes and allocations are those of a GPU, and launches are counted where Triton's would be.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.kernels import linear_logprob as chunks
from fastrl.kernels import rows, vectors
from fastrl.kernels.linear_logprob import CHUNK_ROWS, linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss
from fastrl.kernels.policy_loss import TokenLoss
from fastrl.kernels.workspace import Workspace

N, H, V = 16384, 1536, 151936  # tokens of a microbatch, Qwen2.5-1.5B
NHV = 2 * N * H * V  # floating point operations of one product
GB = 1e9
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(slots=True)
class Launches:
    """In the place of a Triton kernel."""

    grids: list = field(default_factory=list)

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


class Work(TorchDispatchMode):
    """Products, as (operations, dtypes of both operands, dtype of the result), the most bytes alive at a time, and the
    sizes of what was allocated.

    The memory of the tensors that are given, which others made, is not counted.
    """

    def __init__(self, *given):
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.products, self.alive, self.peak, self.allocated = [], {}, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # there is nothing to compute, and torch 2.11 mixes up the arguments of this one on the meta device
        given = kwargs.get("out") if function is torch.ops.aten.addmm.dtype_out else None
        out = function(*args, **kwargs) if given is None else given
        packet = function._overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[:2] if packet is torch.ops.aten.mm else args[1:3]
            self.products.append((2 * a.shape[0] * a.shape[1] * b.shape[1], a.dtype, b.dtype, out.dtype))
        if isinstance(out, torch.Tensor) and (storage := out.untyped_storage())._cdata not in self.given:
            if storage._cdata not in self.alive:
                self.allocated.append(storage.nbytes())
            self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.fixture
def launches(monkeypatch):
    made = {}
    for module, name in ((rows, "row_forward_kernel"), (rows, "row_gradient_kernel"), (vectors, "policy_loss_kernel")):
        made[name] = Launches()
        monkeypatch.setattr(module, name, made[name])
    torch.use_deterministic_algorithms(False)  # filling a fresh tensor would be work
    return made


def head():
    hidden, weight = (torch.empty(n, H, dtype=BF16, device="meta") for n in (N, V))
    return hidden, weight, torch.empty(N, dtype=torch.int64, device="meta")


def test_the_loss_of_tokens_takes_six_products_of_bfloat16_and_one_chunk_of_memory(launches):
    hidden, weight, target = head()
    vectors = TokenVectors(*(torch.empty(N, device="meta") for _ in range(3)))
    buffer = torch.empty(V, H, device="meta")
    with Work(hidden, weight, target, buffer, *vectors[:3]) as work:
        linear_policy_loss(TokenLoss(), hidden, weight, target, vectors, weight_grad=buffer, triton=True)
    chunks = N // CHUNK_ROWS
    assert sum(product[0] for product in work.products) == 3 * NHV
    assert {product[1:3] for product in work.products} == {(BF16, BF16)}
    assert [product[3] for product in work.products] == [F32, BF16, F32] * chunks  # logits, hidden, weight
    assert {name: len(made.grids) for name, made in launches.items()} == dict.fromkeys(launches, chunks)
    logits, hidden_grad = 4 * CHUNK_ROWS * V, 2 * N * H
    assert logits <= 2.5 * GB
    # nothing of tokens times vocabulary, and nothing of vocabulary times hidden size
    assert logits + hidden_grad <= work.peak <= logits + hidden_grad + 100 * N


def test_log_probabilities_alone_take_two_products_and_64_mib(launches):
    hidden, weight, target = head()
    with Work(hidden, weight, target) as work, torch.no_grad():
        linear_logprob(hidden, weight, target, triton=True, need_entropy=True)
    slabs = -(-V // rows.SLAB_WORDS)
    assert sum(product[0] for product in work.products) == NHV and len(work.products) == slabs
    assert {product[1:] for product in work.products} == {(BF16, BF16, F32)}
    assert len(launches["row_forward_kernel"].grids) == slabs
    assert work.peak <= 4 * rows.SLAB_ELEMENTS + 100 * N


def test_log_probabilities_with_their_gradient_take_eight_products(launches):
    hidden, weight, target = head()
    hidden.requires_grad_()
    buffer = torch.empty(V, H, device="meta")
    with Work(hidden, weight, target, buffer) as work:
        logprobs, _, _ = linear_logprob(hidden, weight, target, triton=True, weight_grad=buffer)
        kept = sum(size for _, size in work.alive.values())
        logprobs.sum().backward()
    assert 4 * N <= kept <= 100 * N  # between forward and backward: vectors
    assert sum(product[0] for product in work.products) == 4 * NHV
    assert {product[1:3] for product in work.products} == {(BF16, BF16)}
    assert len(launches["row_gradient_kernel"].grids) == N // CHUNK_ROWS
    assert work.peak <= 4 * CHUNK_ROWS * V + 2 * N * H + 100 * N


def test_a_frozen_head_takes_no_product_for_its_gradient(launches):
    hidden, weight, target = head()
    hidden.requires_grad_()
    with Work(hidden, weight, target) as work:
        linear_logprob(hidden, weight, target, triton=True)[0].sum().backward()
    assert sum(product[0] for product in work.products) == 3 * NHV  # forward, again, and the gradient in hidden
    assert work.peak <= 4 * CHUNK_ROWS * V + 2 * N * H + 100 * N


def test_microbatches_share_one_allocation_of_logits(launches):
    hidden, weight, target = head()
    vectors = TokenVectors(*(torch.empty(N, device="meta") for _ in range(3)))
    buffer, workspace, leaf = torch.empty(V, H, device="meta"), Workspace(), hidden.detach().requires_grad_()
    with Work(hidden, weight, target, buffer, *vectors[:3]) as work:
        for _ in range(3):
            linear_policy_loss(
                TokenLoss(), hidden, weight, target, vectors, weight_grad=buffer, triton=True, workspace=workspace
            )
            linear_logprob(leaf, weight, target, triton=True, workspace=workspace)[0].sum().backward()
    assert [size for size in work.allocated if size > 1e8] == [4 * CHUNK_ROWS * V]


@pytest.mark.parametrize("fused", [False, True])
def test_without_triton_too_every_product_of_a_gpu_is_of_bfloat16(fused, launches, monkeypatch):
    """Float32 operands would be multiplied outside of the tensor cores, ten times slower."""
    hidden, weight, target = head()
    hidden, target = hidden[:300], target[:300]
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 100 * V)
    buffer, leaf = torch.empty(V, H, device="meta"), hidden.detach().requires_grad_()
    with Work(hidden, weight, target, buffer) as work:
        if fused:
            vectors = TokenVectors(*torch.empty(2, len(hidden), device="meta"))
            linear_policy_loss(TokenLoss(), hidden, weight, target, vectors, weight_grad=buffer, triton=False)
        else:
            linear_logprob(leaf, weight, target, triton=False, weight_grad=buffer)[0].sum().backward()
    assert sum(product[0] for product in work.products) == 4 * 2 * len(hidden) * H * V
    assert {product[1:3] for product in work.products} == {(BF16, BF16)}
    assert {product[3] for product in work.products} == {F32, BF16}  # logits and weight gradients, hidden gradients
    assert max(work.allocated) < buffer.nbytes / 2, "another [V, H]"
