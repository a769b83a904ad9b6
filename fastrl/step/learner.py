"""From a batch to its gradient: what the objective compares with, and the loss, microbatch by microbatch."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fastrl.base import faults
from fastrl.base.types import TrainBatch
from fastrl.models.critic import Critic, explained_variance
from fastrl.models.inputs import inputs_of, upload
from fastrl.models.policy import Policy
from fastrl.models.reference import Reference
from fastrl.objectives.base import Objective
from fastrl.step.batching import averages, denominator, minibatches, select
from fastrl.step.metrics import sampling_mismatch
from fastrl.step.microbatches import Fitting
from fastrl.updates.base import UpdateRule, check_state
from fastrl.watch import bad_step


class Minibatch:
    """Some groups of a step's batch through all passes of the update rule."""

    def __init__(self, batch: TrainBatch):
        self.batch = batch

    def visited(self, logprobs: torch.Tensor) -> None:
        """What the first pass sees is what is old to the next ones, where nothing is old yet."""
        if self.batch.old_logprobs is None:
            self.batch = replace(self.batch, old_logprobs=logprobs)


@dataclass(kw_only=True)
class Learner:
    """The models of a run and how they learn. Knows neither where batches come from nor when a run ends."""

    policy: Policy
    reference: Reference | None
    critic: Critic | None  # where the objective needs values
    objective: Objective
    update: UpdateRule
    num_minibatches: int
    fitting: Fitting  # cuts microbatches
    after_backward: Callable[[], None] = lambda: None  # called with every backward pass of the policy
    old_from_engine: bool = False  # the engine's log-probabilities are the old ones, where an objective has old ones

    mismatch: dict[str, float] = field(default_factory=dict, init=False)  # engine against trainer, this step and rank
    mismatch_tokens: int | None = field(default=None, init=False)  # that it is measured on; None: not yet in this step
    broken: dict[str, int] = field(default_factory=dict, init=False)  # numbers of this step that were not finite

    def __post_init__(self):
        self.update.start(self.policy)
        check_state(self.update, self.policy.like)

    @property
    def trained(self) -> dict[str, Policy | Critic]:
        return {"policy": self.policy, **({"critic": self.critic} if self.critic else {})}

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """The batch with the scores that the objective reads and what it makes of them.

        A credit that is not finite marks a row that nothing may be learnt from. What an objective reshapes may be
        finite again, for it looks at rewards or at a mask; the mark is put back.
        """
        old = {"old_logprobs": batch.rollout_logprobs} if self.old_from_engine else {}
        needs = self.objective.needs(self.num_minibatches) - old.keys()
        batch = replace(batch, **old, **{name: self.scored(name, batch) for name in sorted(needs)})
        if self.reference:
            self.reference.rest()
        prepared = self.objective.prepare(batch)
        return replace(prepared, credit=prepared.credit.masked_fill(~batch.credit.isfinite(), torch.nan))

    def scored(self, name: str, batch: TrainBatch) -> torch.Tensor:
        """[B, S] of old_logprobs, current_logprobs, ref_logprobs or values, without gradients."""
        model = {"ref_logprobs": self.reference, "values": self.critic}.get(name, self.policy)
        return faults.through(name, self.fitting.run(partial(self.scores, model, batch)))

    def scores(self, model: Policy | Reference | Critic, batch: TrainBatch) -> torch.Tensor:
        with torch.no_grad():
            pieces = self.fitting.cut(batch, packed=model.packs)
            return gathered(((rows, model.score(part)) for rows, part in pieces), like=batch.rollout_logprobs)

    def learn(self, batch: TrainBatch) -> tuple[dict[str, float], TrainBatch]:
        """One step of the update rule, minibatch by minibatch -> metrics, and the batch as its first pass left it."""
        self.mismatch, self.mismatch_tokens = {}, None
        parts = [Minibatch(part) for part in minibatches(batch, self.num_minibatches)]
        metrics = self.update.update(self.policy, [partial(self.accumulate, part) for part in parts])
        check_state(self.update, self.policy.like)  # a tensor that the first update has made
        return metrics, parts[0].batch if len(parts) == 1 else batch

    def accumulate(self, minibatch: Minibatch) -> dict[str, float]:
        """Leave the minibatch's gradient at the current weights in the gradient buffer; return its metrics."""
        # counted once, over all ranks, so the gradient does not depend on how the minibatch is cut further
        count = denominator(minibatch.batch, self.objective.normalizer)
        tokens = denominator(minibatch.batch, "token")
        counts = {"token": tokens, "completion": denominator(minibatch.batch, "completion")}
        batch = replace(minibatch.batch, counts=counts)
        if self.objective.needs_current:
            current = None if batch.old_logprobs is None else self.scored("current_logprobs", batch)
            batch = self.objective.couple(batch, current)
        sums, seen = self.fitting.run(partial(self.backward, batch, count))
        if self.mismatch_tokens is None:  # later passes have other weights
            difference = (seen - batch.rollout_logprobs)[batch.response_mask]
            self.mismatch, self.mismatch_tokens = sampling_mismatch(difference), len(difference)
        minibatch.visited(seen)
        if sums:
            if not batch.credit.isfinite().all():
                # whatever the loss reads of a marked row, and if it reads nothing
                sums["loss"] = torch.full_like(sums["loss"], torch.nan)
            faults.through("loss", sums["loss"])
        metrics = averages(sums, tokens)
        if not math.isfinite(metrics["loss"]):
            bad_step.note(self.broken, sums.get("loss"), seen, batch.response_mask)
        return metrics

    def backward(self, minibatch: TrainBatch, count: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Add up the gradient, microbatch by microbatch -> sums of the metrics, logprobs [B, S]. No collectives."""
        self.policy.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        seen = []
        for learns, rows, part in self.microbatches(minibatch):
            faults.at("forward")
            loss, logprobs, metrics = self.forward(part, count, learns)
            if learns:
                loss.backward()
                self.after_backward()
            seen.append((rows, logprobs.detach()))
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        return sums, gathered(seen, like=minibatch.rollout_logprobs)

    def forward(self, part: TrainBatch, count: float, learns: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """A microbatch -> its share of the loss, logprobs [B, S], and metrics summed over response tokens.

        The microbatch is on the CPU, what is returned on the model's device. Nothing here waits for it.
        """
        policy = self.policy
        inputs, part = upload((inputs_of(part, policy.packs), part), policy.device)
        fused = self.objective.fused(part) if learns and policy.fuses else None
        if fused is not None:
            loss, logprobs, metrics = policy.fused_loss(inputs, fused, count)
            return loss, logprobs, {"loss": loss.detach() * part.counts["token"], **metrics}
        with torch.set_grad_enabled(learns):
            logprobs, entropy = policy.logprobs(inputs, need_entropy=True)
            assert entropy is not None  # need_entropy
            loss, metrics = self.objective.loss_sum(logprobs, entropy, part)
        return loss / count, logprobs, {"loss": loss.detach() * (part.counts["token"] / count), **metrics}

    def microbatches(self, minibatch: TrainBatch) -> Iterator[tuple[bool, torch.Tensor, TrainBatch]]:
        """(whether there is anything to learn, row indices, rows); rows without a gradient only go forward."""
        silent = self.objective.silent(minibatch)
        for learns, rows in ((True, (~silent).nonzero()[:, 0]), (False, silent.nonzero()[:, 0])):
            pieces = self.fitting.cut(
                select(minibatch, rows), splits_groups=self.objective.splits_groups, packed=self.policy.packs
            )
            yield from ((learns, rows[index], part) for index, part in pieces)

    def fit_critic(self, batch: TrainBatch) -> dict[str, float]:
        """Teach the critic the batch's returns, minibatch by minibatch; return its metrics."""
        critic = self.critic
        assert critic is not None

        def accumulate(part: TrainBatch) -> dict[str, float]:
            tokens = denominator(part, "token")

            def backward() -> dict[str, torch.Tensor]:
                pieces = (piece for _, piece in self.fitting.cut(part, packed=critic.packs))
                return critic.backward(pieces, self.objective.value_loss_sum, tokens)

            return averages(self.fitting.run(backward), tokens)

        critic.wake()
        metrics = critic.fit([partial(accumulate, part) for part in minibatches(batch, self.num_minibatches)])
        critic.rest()
        return metrics | {"critic/explained_variance": explained_variance(batch)}

    def set_lr(self, step: int, steps: int) -> None:
        """Learning rates of the step after `step` of `steps`."""
        for model in self.trained.values():
            model.set_lr(model.optim.lr_at(step, steps))

    def end_step(self, step: int) -> tuple[dict[str, list[str]], dict[str, int]]:
        """Close the step for the guards -> what each has refused it for, and how many numbers were not finite."""
        reasons = {name: model.guard.end_step(step) for name, model in self.trained.items()}
        broken = self.broken | {f"{n} gradient": m.own_broken for n, m in self.trained.items() if m.own_broken}
        self.broken = {}
        for model in self.trained.values():
            model.own_broken = 0
        return reasons, broken

    def give_up(self) -> None:
        """Raises NumericsError where a guard has refused too many steps."""
        for model in self.trained.values():
            model.guard.give_up()

    def counters(self) -> dict[str, float]:
        critic = {"critic/skipped_total": float(self.critic.guard.skipped)} if self.critic else {}
        guard = self.policy.guard
        return {"skipped_total": float(guard.skipped), **critic, "empty_total": float(guard.empty)}

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's weights and optimizer states."""
        yield from self.policy.state_tensors()
        yield from ((f"update.{name}", tensor) for name, tensor in self.update.state_tensors().items())
        if self.critic:
            yield from ((f"critic.{name}", tensor) for name, tensor in self.critic.state_tensors())

    def state_names(self) -> list[str]:
        critic = self.critic.state_names() if self.critic else []
        kept = [f"update.{name}" for name in self.update.state_tensors()]
        return [*self.policy.state_names(), *kept, *(f"critic.{name}" for name in critic)]

    def shard_sizes(self) -> dict[str, int]:
        """Elements of this rank's shards, by the prefix of their tensors' names."""
        critic = {"critic.": len(self.critic.master)} if self.critic else {}
        return {"": len(self.policy.master), **critic}

    def state_dict(self) -> dict:
        """Everything but tensors that the next step depends on."""
        return {
            "tokens_per_microbatch": self.fitting.tokens,
            "policy_version": self.policy.policy_version,
            "tensors": sorted(self.state_names()),
            "update": self.update.state_dict(),
            "guard": self.policy.guard.state_dict(),
            **({"critic_guard": self.critic.guard.state_dict()} if self.critic else {}),
        }

    def load_state_dict(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what a checkpoint has; of `tokens_per_microbatch` the trainer decides."""
        self.update.load_state_dict(state["update"])
        self.policy.guard.load_state_dict(state["guard"])
        self.policy.load_state_tensors(tensors)
        self.update.load_state_tensors(under("update.", tensors))
        if self.critic:
            self.critic.load_state_tensors(under("critic.", tensors))
            self.critic.guard.load_state_dict(state["critic_guard"])
        self.policy.policy_version = state["policy_version"]


def gathered(scores: Iterable[tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    """Row indices and [rows, columns] of microbatches -> [B, S] on the CPU, zero elsewhere. Waits once for a device."""
    whole, parts = torch.zeros_like(like), list(scores)
    values = torch.cat([own.flatten() for _, own in parts] or [like.new_zeros(0)]).to("cpu", like.dtype)
    sizes = [own.numel() for _, own in parts]
    for (rows, own), part in zip(parts, values.split(sizes), strict=True):
        whole[rows, : own.shape[1]] = part.view(own.shape)
    return whole


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
