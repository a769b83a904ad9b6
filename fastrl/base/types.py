"""The data that flows through one training step, and the errors that end a run. Imports torch and nothing of ours."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


class DataError(ValueError):
    """A problem file, a row or a gold answer cannot be used."""

    exit_code = 3


class NumericsError(RuntimeError):
    """The run left the finite numbers and did not come back."""

    exit_code = 4


class EngineError(RuntimeError):
    """The engine or a worker process was lost."""

    exit_code = 5


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not fit the run that reads it."""

    exit_code = 6


@dataclass(slots=True, kw_only=True)
class Problem:
    """A prompt and what a verifier compares completions with.

    Example: Problem(id="arithmetic/train/0", prompt="3+5*2-7=", answer="9")
    """

    id: str
    prompt: str | list[dict[str, str]]  # text, or chat messages with "role" and "content"
    answer: str
    columns: dict = field(default_factory=dict)  # all other columns of the row; reward functions receive them
    prompt_ids: list[int] = field(default_factory=list)  # filled once by data.encode_prompts
    as_template: bool = True  # whether they are the chat template's own; filled with them
    profile_rewards: Tensor | None = None  # [N] float32, rewards of N offline completions
    profile_right: Tensor | None = None  # [N] float32 in [0, 1], whether each of them was right; their mean: pass rate


@dataclass(slots=True, kw_only=True)
class Completion:
    token_ids: list[int]  # generated ids; the last one is EOS when finish_reason is "stop"
    rollout_logprobs: list[
        float | None
    ]  # nats at the sampling temperature, under its engine; None if that has no number
    finish_reason: str  # "stop" | "length" (cut off by max_new_tokens)
    text: str = ""
    reward: float = 0.0  # weighted sum over the reward functions
    rewards: dict[str, float | None] = field(default_factory=dict)  # by reward function; None = not applicable

    def __post_init__(self):
        if len(self.token_ids) != len(self.rollout_logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.rollout_logprobs)} rollout_logprobs")


@dataclass(slots=True, kw_only=True)
class RolloutGroup:
    problem: Problem
    completions: list[Completion]  # the group size may differ from group to group
    policy_version: int  # weight updates published before this group was sampled

    @property
    def rewards(self) -> Tensor:
        """[G] float32."""
        return torch.tensor([c.reward for c in self.completions])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """B completions with their prompts, right-padded to S tokens; rows of a group are adjacent.

    A batch is never written on: each stage returns a new one, by `dataclasses.replace`, that has more. make_batch:
    what was sampled; Learner.prepare: scores, then what the objective makes of them; Learner.accumulate: the counts.

    Every per-token tensor is label-aligned: column s is about token `input_ids[:, s]` given the tokens before it,
    so `response_mask[:, 0]` is always False and `logprobs[:, 0]` is never used. Padding may hold anything.
    """

    input_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] bool
    response_mask: Tensor  # [B, S] bool, True on the generated tokens that the loss sees
    rollout_logprobs: Tensor  # [B, S] float32, nats
    group: Tensor  # [B] int64, which group the row belongs to
    group_size: Tensor  # [B] int64, completions of that group, in this batch or not
    reward: Tensor  # [B] float32
    credit: Tensor  # [B] float32, advantage or regression target
    truncated: Tensor  # [B] bool, cut off by max_new_tokens
    prompt_lengths: Tensor  # [B] int64, tokens; rows of a group have the same prompt
    max_new_tokens: int
    # scores
    old_logprobs: Tensor | None = None  # [B, S] float32, the policy at the start of the step
    ref_logprobs: Tensor | None = None  # [B, S] float32, the frozen reference
    values: Tensor | None = None  # [B, S] float32, the critic at the start of the step
    # what Objective.prepare makes of them
    advantages: Tensor | None = None  # [B, S] float32, credit per token, where an objective has it
    returns: Tensor | None = None  # [B, S] float32, what the critic learns
    # of a minibatch at the present weights
    residual: Tensor | None = None  # [B] float32, what is left of a regression, where rows depend on each other
    counts: dict[str, float] = field(
        default_factory=dict
    )  # response tokens and completions of the minibatch, all ranks

    def __len__(self) -> int:
        return len(self.input_ids)

    def lengths(self) -> Tensor:
        """[B] int64, tokens of prompt and completion."""
        return self.attention_mask.sum(dim=1)
