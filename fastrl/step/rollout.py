"""Sampling and scoring: a plan of problems becomes groups of completions with rewards."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastrl.base import faults, ranks
from fastrl.base.spans import Spans
from fastrl.base.types import Completion, Problem, RolloutGroup
from fastrl.engine.base import Engine, Request, Sampling, sampling_seed
from fastrl.engine.checked import sample_checked
from fastrl.models.tokens import completion_texts, num_ids
from fastrl.rewards import RewardSet
from fastrl.step.metrics import evaluation_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class EvalSet:
    """Problems that a run is evaluated on, k completions of each."""

    name: str
    problems: list[Problem]
    k: int
    sampling: Sampling


@dataclass(kw_only=True)
class Rollout:
    """engine + verifier. Each rank samples its share of a plan."""

    engine: Engine
    rewards: RewardSet
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling
    seed: int
    eos_ids: tuple[int, ...] = ()  # that end a completion, besides the tokenizer's
    grade_truncated: bool = False  # grade completions cut off by max_new_tokens like any other
    canary: Callable[[], dict[str, float]] | None = None  # run once for each version of the weights; may raise
    make_room: Callable[[], None] = lambda: None  # before the engine takes its memory
    spans: Spans = field(default_factory=Spans)
    statuses: dict[str, int] = field(default_factory=dict, init=False)  # outcomes of the last run, by class
    # (mean, completions it is a mean over) by name
    reward_metrics: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)
    lowest: float = field(default=0.0, init=False)  # total that a graded completion has earned in training, at most 0
    canary_metrics: dict[str, float] = field(default_factory=dict, init=False)  # of the newest weights
    checked_version: int | None = field(default=None, init=False)
    num_ids: int = field(init=False)

    def __post_init__(self):
        self.num_ids = num_ids(self.tokenizer)

    def run(self, plan: list[tuple[Problem, int]], step: int) -> list[RolloutGroup]:
        """[(problem, group_size)] of all ranks -> this rank's groups, sampled for training step `step` and scored."""
        own = slice(ranks.rank(), None, ranks.size())
        with self.spans("rollout"):
            groups = self.sample(plan[own], self.sampling, "train", step, firsts=first_samples(plan)[own])
        with self.spans("reward"):
            self.lowest = self.score(groups, self.lowest)
        return groups

    def evaluate(self, problems: list[Problem], k: int, sampling: Sampling):
        """k completions of each problem -> this rank's groups and their `evaluation_table`.

        The seeds depend on the problem and the sample only, so two evaluations differ by their weights alone.
        """
        own = [(problem, k) for problem in problems[ranks.rank() :: ranks.size()]]
        groups = self.sample(own, sampling, "eval")
        self.score(groups)
        correct = [[self.is_right(c) for c in g.completions] for g in groups]
        keys = [[self.rewards.vote_key(c.text) for c in g.completions] for g in groups]
        return groups, evaluation_table(groups, correct, keys)

    def is_right(self, completion: Completion) -> bool:
        """What the first verifier says, whatever its weight; with user functions alone, a total reward of 1 or more."""
        if self.rewards.verifiers:
            return (completion.rewards.get(self.rewards.verifiers[0].name) or 0.0) >= 1.0
        return completion.reward >= 1.0

    def sample(
        self, plan: list[tuple[Problem, int]], sampling: Sampling, *stream: object, firsts: list[int] | None = None
    ) -> list[RolloutGroup]:
        """firsts: number of the first sample of each group, if not 0: a seed depends on (stream, problem, number)."""
        requests = [
            Request(
                prompt_ids=problem.prompt_ids,
                seeds=[sampling_seed(self.seed, *stream, problem.id, i) for i in range(first, first + group_size)],
            )
            for (problem, group_size), first in zip(plan, firsts or [0] * len(plan), strict=True)
        ]
        self.make_room()
        with self.engine.generate_phase():
            if self.canary and self.checked_version != self.engine.policy_version:
                self.canary_metrics = self.canary()
                self.checked_version = self.engine.policy_version
            faults.at("generate")
            self.engine.progress = self.spans.beat
            sampled = sample_checked(self.engine, requests, sampling, self.num_ids)
        flat = [c for completions in sampled for c in completions]
        for completion in flat[:1]:
            completion.rollout_logprobs = faults.through("rollout_logprobs", completion.rollout_logprobs)
        texts = completion_texts(self.tokenizer, [c.token_ids for c in flat], self.eos_ids)
        for completion, text in zip(flat, texts, strict=True):
            completion.text = text
        version = self.engine.policy_version
        return [
            RolloutGroup(problem=problem, completions=completions, policy_version=version)
            for (problem, _), completions in zip(plan, sampled, strict=True)
        ]

    def score(self, groups: list[RolloutGroup], lowest: float = 0.0) -> float:
        """Fill `reward` and `rewards`. lowest: total that a completion has earned before, at most 0 -> the lowest now.

        Collective. A completion that was cut off is not graded, unless `grade_truncated`. It earns the smaller of 0 and
        the lowest total in its group; where all of the group were cut off, of all completions that any rank has graded,
        now or before. So it never beats one that came to an end and was wrong, whatever a wrong one earns, and earns 0
        where no reward is negative.
        """
        faults.at("grade")
        rows = [(g.problem, c) for g in groups for c in g.completions]
        graded = [(problem, c) for problem, c in rows if not self.is_cut_off(c)]
        columns = {name: [p.columns.get(name) for p, _ in graded] for name in {n for p, _ in graded for n in p.columns}}
        scores = self.rewards.score(
            [p.prompt for p, _ in graded],
            [c.text for _, c in graded],
            [p.answer for p, _ in graded],
            completion_ids=[c.token_ids for _, c in graded],
            columns=columns,
        )
        total = faults.through("reward", scores.total)
        for i, (_, completion) in enumerate(graded):
            completion.reward = total[i]
            completion.rewards = {name: values[i] for name, values in scores.each.items()}
        lowest = -ranks.all_max(-min(lowest, least([c for _, c in graded], 0.0)))
        for group in groups:
            cut_off = [c for c in group.completions if self.is_cut_off(c)]
            floor = min(0.0, least([c for c in group.completions if not self.is_cut_off(c)], lowest))
            for completion in cut_off:
                completion.reward = floor
        self.statuses = {**scores.statuses, "truncated": len(rows) - len(graded)}
        self.reward_metrics = {name: (value, scores.counts[name]) for name, value in scores.metrics.items()}
        return lowest

    def is_cut_off(self, completion: Completion) -> bool:
        """Whether it is left ungraded because its end is missing."""
        return completion.finish_reason == "length" and not self.grade_truncated


def least(completions: list[Completion], otherwise: float) -> float:
    """The lowest reward that is a number, `otherwise` if there is none."""
    return min((c.reward for c in completions if math.isfinite(c.reward)), default=otherwise)


def first_samples(plan: list[tuple[Problem, int]]) -> list[int]:
    """For each group the completions of the same problem before it: a problem that comes twice is not sampled alike."""
    seen: dict[str, int] = {}
    firsts = []
    for problem, group_size in plan:
        firsts.append(seen.get(problem.id, 0))
        seen[problem.id] = firsts[-1] + group_size
    return firsts
