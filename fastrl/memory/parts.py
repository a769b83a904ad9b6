"""Bytes of the parts of a run on one GPU, from shapes and settings alone.

Weights, gradients, master, optimizer state, snapshots and the KV cache are sizes of tensors. The rest are estimates:
activations are fitted to what transformers' layers allocate on a CPU, and what CUDA and vLLM take for themselves is
named here once.
"""

import math
from dataclasses import dataclass

import torch

from fastrl.kernels.linear_logprob import CHUNK_ELEMENTS, CHUNK_ROWS
from fastrl.weights.buffer import ALIGN, PART, round_up
from fastrl.weights.norm import AT_A_TIME, ROW

MIB, GIB = 2**20, 2**30
CONTEXT = int(1.5 * GIB)  # CUDA context, cuBLAS, NCCL, per process; estimate until measured
GRAPHS = 1 * GIB  # vLLM's graphs and workspaces that stay while training; estimate until measured
ENGINE = GIB // 2  # those that it uses while it samples; estimate until measured
ENGINE_LOGITS = 16  # bytes per sequence and word: four float32 copies of a sampler's logits; estimate until measured
HF_LOGITS = 24  # the same of engine/hf.py's draw(): logits, logprobs and two float64 vectors
HF_GROWTH = 1.5  # models/cache.py makes room ahead
SLAB = 4 * CHUNK_ELEMENTS  # logits alive where only log-probabilities are asked for
NORM = 12 / ROW  # bytes per element of a chunk of the shard: norms of rows, in float32 and in float64
SPLIT_STEP = 20  # the same of a split master's step: joined, moved, and the bits of both halves


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a plan reads of a decoder. elements: of the flat buffer of one rank; critic_elements: of the critic's."""

    name: str
    parameters: int  # tied ones once
    elements: int
    critic_elements: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int, ...]  # per layer, tokens of context that it keeps; 0 = all
    qk_norm: bool
    limit: int  # tokens of context that the model was made for; 0 = unknown

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def attention_width(self) -> int:
        """Query, key, value and output of attention, numbers per token."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """What a plan reads of a run. Sizes in bytes and tokens; `sequences` are completions of a step on one rank."""

    context: int  # longest prompt and completion together
    tokens_per_microbatch: int
    prompt: int = 0  # longest prompt; 0: as long as the context
    group_size: int = 1  # completions that share a prompt, at least
    least_rows: int = 1  # sequences that a microbatch cannot be cut below
    sequences: int = 1
    ranks: int = 1
    capacity: int = 0  # of the card; 0 = no limit known, as on a CPU
    cuda: bool = True
    dtype: torch.dtype = torch.bfloat16
    grad_dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    master: str = "float32"
    critic_optimizer: str | None = None  # None: no critic
    reference: bool = False
    reference_on_host: bool = False
    scores: bool = False  # whether there is a score phase
    copies: int = 0  # of the master; this and the next three as fastrl.updates.base says
    keeps: int = 0
    holds_state: bool = False
    per_coordinate: bool = False
    checkpoint: str = "none"  # none, selective, full
    offload: tuple[str, ...] = ()  # optimizer: master and state, while sampling; activations: checkpoints
    attention: str = "sdpa"
    engine: str = "vllm"
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 8192
    kv_bytes: int = 0  # asked for; 0 = what is left
    kv_kept: bool = False  # while training

    @property
    def tokens(self) -> int:
        """Of a microbatch: what cannot be cut comes whole."""
        return max(self.tokens_per_microbatch, self.least_rows * self.context)

    @property
    def running(self) -> int:
        """Sequences that the engine has at a time."""
        return min(self.max_num_seqs, self.sequences)


def buffer(elements: int, ranks: int) -> int:
    """Elements of a flat buffer that divides among ranks."""
    return round_up(elements, ALIGN * ranks)


def trained(elements: int, optimizer: str, s: MemorySettings) -> dict[str, int]:
    """Bytes of a ShardedModel on one rank: weights and gradients are whole there, the others a shard."""
    total = buffer(elements, s.ranks)
    shard = total // s.ranks
    own_master = s.dtype != torch.bfloat16  # then the shard of the weights is the master
    return {
        "weights": total * s.dtype.itemsize,
        "gradients": total * torch.promote_types(s.grad_dtype, s.dtype).itemsize,
        "master": 0 if own_master else shard * (2 if s.master == "split" else 4),
        "optimizer": 0 if optimizer.startswith("paged") else optimizer_bytes(shard, optimizer),
    }


def optimizer_bytes(shard: int, optimizer: str) -> int:
    """Two moments: float32, or one byte each, a float32 scale per 256 elements and a table of 256 values."""
    if optimizer == "adamw" or shard < 4096:  # bitsandbytes leaves small tensors in float32
        return 8 * shard
    return 2 * (shard + 4 * math.ceil(shard / 256) + 1024)


def snapshot_bytes(shard: int, s: MemorySettings) -> int:
    """What the update rule holds: copies of the master in its precision, and of the optimizer's state."""
    return s.copies * shard * max(4, s.dtype.itemsize) + s.holds_state * optimizer_bytes(shard, s.optimizer)


def saved_per_layer(model: ModelShape, s: MemorySettings) -> int:
    """Bytes per token that a layer keeps for its backward, as transformers' Llama, Qwen2 and Qwen3 do.

    Of each norm the float32 input, the normalised and the scaled one; query, key, value and output of attention, and
    where it attends packed rows the output in the order of the other layers as well; gate, up, activated gate and
    product of the MLP.
    """
    size = s.dtype.itemsize
    norms = 2 * ((4 + 2 * size) * model.hidden + 4)
    if model.qk_norm:
        norms += (model.heads + model.kv_heads) * ((4 + size) * model.head_dim + 4)
    attention = size * model.attention_width + 4 * model.heads
    if s.cuda and s.attention == "sdpa":
        attention += size * model.heads * model.head_dim
    if s.attention == "eager":
        attention += model.heads * s.context * (4 + size)
    return norms + attention + 4 * size * model.inner


def staying(model: ModelShape, s: MemorySettings) -> int:
    """What `checkpoints` leaves on the device: all, or with offloading what is not autograd's, attention's output."""
    if "activations" not in s.offload:
        return checkpoints(model, s)
    kept = model.heads * (s.dtype.itemsize * model.head_dim + 4)
    return s.tokens * model.layers * kept * (s.checkpoint == "selective")


def checkpoints(model: ModelShape, s: MemorySettings) -> int:
    """Bytes of a microbatch that every layer keeps until its backward.

    full: the layer's input. selective: what attention gives as well, its output and the logsumexp of each head.
    """
    size = s.dtype.itemsize
    if s.checkpoint == "none":
        return s.tokens * model.layers * saved_per_layer(model, s)
    kept = size * model.hidden
    if s.checkpoint == "selective":
        kept += model.heads * (size * model.head_dim + 4)
    return s.tokens * model.layers * kept


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes of a microbatch that are there at one time."""

    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.activations + self.logits


def backward_moments(model: ModelShape, s: MemorySettings) -> list[Moment]:
    """Of the head, the last norm, the last layer and the embedding one is the peak.

    head         the last norm, the hidden states and their gradient, beside the logits
    norm         its gradients in float32
    layer        computed again where it was not kept; the gradients of gate, up and product, of which the last takes
                 the place of what it is of, or the first weight gradient; and the gradient of the layer's output
    embedding    its gradient, before it is added to the buffer
    """
    size, head, tokens, kept = s.dtype.itemsize, head_bytes(model, s), s.tokens, staying(model, s)
    grad = torch.promote_types(s.grad_dtype, s.dtype).itemsize
    added = size + (grad if grad != size else 0)  # bytes of a weight gradient's element on its way
    again = 0
    if s.checkpoint != "none":
        again = saved_per_layer(model, s)
        if s.checkpoint == "selective":
            again -= model.heads * (size * model.head_dim + 4)
    elif "activations" in s.offload:
        again = 3 * size * model.inner  # what the product is of comes back, and nothing else is there yet
    positions = 2 * size * model.head_dim
    product = tokens * size * model.inner
    layer = max(2 * product, product + added * model.inner * model.hidden)
    stays = head["step"]
    return [
        Moment(kept + tokens * ((4 + 3 * size) * model.hidden + positions), head["backward"]),
        Moment(kept + tokens * (13 * size * model.hidden + positions), stays),
        Moment(kept + tokens * (again + size * model.hidden + positions) + layer, stays),
        Moment(added * model.vocab * model.hidden + tokens * size * model.hidden, stays),
    ]


def score_moments(model: ModelShape, s: MemorySettings) -> list[Moment]:
    """Without gradients: a layer's MLP, and the hidden states with the head."""
    per_token = s.tokens * s.dtype.itemsize
    return [
        Moment(per_token * (3 * model.inner + 4 * model.hidden), 0),
        Moment(per_token * 2 * model.hidden, head_bytes(model, s)["score"]),
    ]


def head_bytes(model: ModelShape, s: MemorySettings) -> dict[str, int]:
    """Logits alive at a time; and beside gradients in bfloat16, the head's in float32 until all chunks are in.

    On CUDA a chunk of them is the workspace that the policy keeps until it rests.
    """
    logits = 4 * s.tokens * model.vocab
    upcast = 0 if s.cuda or s.dtype != torch.bfloat16 else 4 * model.vocab * model.hidden
    kept = 4 * min(CHUNK_ROWS, s.tokens) * model.vocab if s.cuda else 0
    backward = kept or 3 * min(SLAB, logits) + upcast
    if torch.promote_types(s.grad_dtype, s.dtype) == torch.bfloat16:
        backward += 4 * model.vocab * model.hidden
    return {"score": min(SLAB, logits) + upcast, "backward": backward, "step": kept}


def engine_bytes(model: ModelShape, s: MemorySettings) -> int:
    """Beside the KV cache. hf: the largest of a batch's prompts, a layer's attention and the sampler's logits."""
    if s.engine == "hf":
        size = s.dtype.itemsize
        prefill = math.ceil(s.running / s.group_size) * (s.prompt or s.context)  # tokens
        repeated = 2 * s.running * s.context * model.heads * model.head_dim * size  # keys and values, for each head
        return max(
            prefill * size * (3 * model.inner + 4 * model.hidden),
            repeated if model.heads != model.kv_heads else 0,
            HF_LOGITS * s.running * model.vocab,
        )
    batch = s.max_num_batched_tokens * s.dtype.itemsize * (2 * model.inner + 4 * model.hidden)
    return (ENGINE if s.cuda else 0) + batch + ENGINE_LOGITS * s.max_num_seqs * model.vocab


def step_bytes(model: ModelShape, s: MemorySettings) -> int:
    """What an optimizer step allocates beside what is there: the largest of its moments, one after the other."""
    shard = buffer(model.elements, s.ranks) // s.ranks
    grad, several = torch.promote_types(s.grad_dtype, s.dtype).itemsize, s.ranks > 1
    chunk, summed = min(shard, PART), min(shard, AT_A_TIME)
    reduced = several * shard * grad if s.cuda else 0  # the shard of the sum
    precision = max(4, s.dtype.itemsize)
    converted = precision if grad != precision else 0  # the gradient as the optimizer takes it
    if s.master != "split":
        taken = converted * shard
    elif s.cuda and s.optimizer == "adamw":
        taken = 0  # one pass over both halves, and the gradient as it is
    else:
        taken = (SPLIT_STEP + converted) * chunk
    moments = [
        int(NORM * summed) + (4 * summed if grad == 2 and not s.cuda else 0),  # a CPU sums up a float32 copy
        taken,
        0 if s.cuda else several * shard * s.dtype.itemsize,  # gloo gathers from a copy
    ]
    return reduced + max(moments)


def kv_per_sequence(model: ModelShape, s: MemorySettings) -> int:
    """Bytes of keys and values of one sequence of the whole context."""
    tokens = sum(min(window or s.context, s.context) for window in model.windows)
    return 2 * model.kv_heads * model.head_dim * s.dtype.itemsize * tokens
