"""Whether fastrl's log-probabilities are those of the model itself. Asked at load, before anything is learnt from them.

A fixed batch of random tokens goes through the model's own forward, row by row and without a cache, and through every
way in which fastrl computes log-probabilities:

    head      fastrl's head on the model's own last hidden states
    trainer   right-padded rows
    again     the same once more: noise that is left on
    packed    the rows as one sequence, the shared prompt once
    engine    prompts with left padding, then token by token with the cache, rows leaving on the way

Training and sampling share fastrl's head, so a head that is not the model's would go unnoticed in a run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.types import TrainBatch
from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.models.decoding import Decoding
from fastrl.models.head import head_weight, label_hidden, logit_map
from fastrl.models.inputs import inputs_of, upload
from fastrl.models.loading import LoadedModel, first_line, load_model, named, pick_device
from fastrl.models.modes import without_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
PROMPTS, COMPLETIONS = (24, 24, 10), (12, 7, 12)  # tokens of each row; the first two share their prompt
# Mean and largest |difference| in nats that rounding may make. float32: 1e-5 is usual, float64 has as much, for many
# families compute rotary positions in float32. In half precision every product is rounded, and the model's own forward
# rounds its logits too: a 135 M model of 30 layers has 0.07 and 0.3 in bfloat16, 0.01 and 0.05 in float16. A head that
# lacks a scale or a cap is off by whole nats.
LIMITS = {
    torch.float64: (1e-4, 1e-4),
    torch.float32: (1e-3, 1e-3),
    torch.float16: (0.05, 0.5),
    torch.bfloat16: (0.3, 2.0),
}
OF_HEAD = 1 / 3  # of the limits: nothing but the logits is rounded there
PATHS = {
    "own": "its own forward",
    "head": "what it does to its logits: fastrl knows a scale and a soft cap",
    "trainer": "its forward in training",
    "again": "a second forward in training, for something in it stays random",
    "packed": "its forward of packed rows",
    "engine": "its forward with a cache, token by token",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """The fixed batch, M response tokens in all; log-probabilities are theirs, [M], row after row."""

    batch: TrainBatch
    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def targets(self) -> Tensor:
        return self.batch.input_ids[self.batch.response_mask]


def compare_with_own_forward(model_dir: str, *, dtype: str = "float32", attention: str = "sdpa") -> float:
    """Largest difference in nats between fastrl's log-probabilities of a fixed batch and the model's own forward.

    model_dir: what `--model` takes. dtype: of the weights, "float32", "bfloat16", "float16" or "float64". The
    engine's path and the trainer's are both compared. Raises ValueError where the model is refused.
    """
    device, weights = pick_device("auto", dtype)
    return max(check_model(load_model(model_dir, dtype=weights, device=device, attention=attention)).values())


def check_model(loaded: LoadedModel, *, sampled: bool = True) -> dict[str, float]:
    """Largest difference in nats by path; raises ValueError where one is more than rounding.

    sampled: whether the model's own cache is what samples (`--engine hf`).
    """
    rows, limits = fixed_rows(loaded), LIMITS[loaded.model.dtype]
    found: dict[str, float] = {}
    with torch.no_grad():
        own, hidden = tried(loaded, "own", partial(own_forward, loaded, rows))
        for path, logprobs in ways(loaded, rows, hidden, sampled):
            difference = (tried(loaded, path, logprobs).double() - own).abs()
            figures = [difference.mean().item(), difference.max().item()]
            mean, most = (limit * (OF_HEAD if path == "head" else 1) for limit in limits)
            if not (figures[0] <= mean and figures[1] <= most):
                off = f"{figures[1]:.3g} nats, {figures[0]:.3g} on average; rounding makes less than {most:.2g}"
                raise refusal(loaded, f"has other log-probabilities in {PATHS[path]} ({off})")
            found[path] = figures[1]
    return found


def tried(loaded: LoadedModel, path: str, function: Callable[[], T]) -> T:
    """function(), whose errors become a ValueError that names the model and the path."""
    try:
        return function()
    except ValueError as error:
        raise ValueError(named(loaded.path, error)) from error
    except Exception as error:  # a family that is built otherwise fails in its own way, somewhere inside transformers
        if means_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
        raise refusal(loaded, f"cannot be used: {PATHS[path].partition(',')[0]} fails with {said}") from error


def refusal(loaded: LoadedModel, what: str) -> ValueError:
    return ValueError(f"--model {loaded.path}: {type(loaded.model).__name__} {what}. See docs/models.md")


def ways(loaded: LoadedModel, rows: Rows, hidden: Tensor, sampled: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The paths of `check_model` and what gives their log-probabilities [M]. hidden: the model's own."""
    yield "head", partial(of_head, loaded, hidden, rows)
    yield "trainer", partial(of_trainer, loaded, rows)
    yield "again", partial(of_trainer, loaded, rows)
    if loaded.packs:
        yield "packed", partial(of_trainer, loaded, rows, packed=True)
    if sampled:
        yield "engine", partial(of_engine, loaded, rows)


def fixed_rows(loaded: LoadedModel) -> Rows:
    """Random tokens that are no control tokens, cut to what the model can take."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 64
    shrink = min(1.0, longest / max(p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)))
    lengths = [[max(1, int(n * shrink)) for n in some] for some in (PROMPTS, COMPLETIONS)]
    special = {*loaded.tokenizer.all_special_ids, *loaded.eos_ids, loaded.pad_id}
    plain = torch.tensor([i for i in range(loaded.num_tokens) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> list[int]:
        return plain[torch.randint(len(plain), (n,), generator=generator)].tolist()

    shared = drawn(lengths[0][0])
    prompts, completions = [shared, shared, drawn(lengths[0][2])], [drawn(n) for n in lengths[1]]
    return Rows(batch_of(prompts, completions, loaded), prompts, completions)


def batch_of(prompts: list[list[int]], completions: list[list[int]], loaded: LoadedModel) -> TrainBatch:
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    B, S = len(texts), max(map(len, texts))
    ids = torch.tensor([text + [loaded.pad_id] * (S - len(text)) for text in texts])
    column = torch.arange(S)
    starts, ends = (torch.tensor([len(x) for x in some]) for some in (prompts, texts))
    rows, zeros = torch.zeros(B), torch.zeros(B, S)
    return TrainBatch(
        input_ids=ids,
        attention_mask=column < ends[:, None],
        response_mask=(column >= starts[:, None]) & (column < ends[:, None]),
        rollout_logprobs=zeros,
        group=torch.tensor([0, 0, 1]),
        group_size=torch.tensor([2, 2, 1]),
        reward=rows,
        credit=rows,
        truncated=rows.bool(),
        prompt_lengths=starts,
        max_new_tokens=max(map(len, completions)),
    )


def own_forward(loaded: LoadedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """The model as its authors wrote it, row by row -> log-probabilities [M], and the last hidden states [M, H]."""
    model, logprobs, states = loaded.model, [], []
    with as_written(model), loaded.liger.out() if loaded.liger else nullcontext():
        for prompt, completion in zip(rows.prompts, rows.completions, strict=True):
            ids = torch.tensor([prompt + completion], device=model.device)
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1, : loaded.num_tokens].double()
            logprobs.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
            states.append(model.base_model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1])
    return torch.cat(logprobs), torch.cat(states)


@contextmanager
def as_written(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, the model is in eval mode, and its attention the definition, where it has a choice."""
    attention = model.config._attn_implementation
    assert attention is not None  # set when a model is loaded
    with without_checkpoints(model):
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(attention)


def of_head(loaded: LoadedModel, hidden: Tensor, rows: Rows) -> Tensor:
    weight = head_weight(loaded.model)[: loaded.num_tokens]
    return linear_logprob(
        hidden, weight, rows.targets.to(hidden.device), logit_map=logit_map(loaded.model), triton=False
    )[0]


def of_trainer(loaded: LoadedModel, rows: Rows, *, packed: bool = False) -> Tensor:
    batch = rows.batch
    hidden = label_hidden(loaded.model, upload(inputs_of(batch, packed), loaded.model.device))
    return of_head(loaded, hidden, rows)


def of_engine(loaded: LoadedModel, rows: Rows) -> Tensor:
    """As `engine.hf` samples: prompts once, rows from them, and rows that have ended leave the cache."""
    model, at = loaded.model, list(range(len(rows.prompts)))
    found: list[list[Tensor]] = [[] for _ in at]
    with without_checkpoints(model):
        text = Decoding(model, [rows.prompts[0], rows.prompts[2]], pad_id=loaded.pad_id)
        text.select(torch.tensor([0, 0, 1], device=model.device))
        for t in range(max(map(len, rows.completions))):
            keep = [i for i, row in enumerate(at) if t < len(rows.completions[row])]
            if len(keep) < len(at):
                at = [at[i] for i in keep]
                text.select(torch.tensor(keep, device=model.device))
            tokens = torch.tensor([rows.completions[row][t] for row in at], device=model.device)
            logprobs = text.logits(loaded.num_tokens).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            for row, value in zip(at, logprobs, strict=True):
                found[row].append(value)
            text.append(tokens)
    return torch.stack([value for row in found for value in row])
