"""The order of things: one step, and the run around it. Knows no algorithm."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from fastrl import bad_step, checkpoint, faults, ranks
from fastrl.allocation.base import Allocation
from fastrl.batching import averages, denominator, make_batch, minibatches, select
from fastrl.critic import Critic, explained_variance
from fastrl.fitting import Fitting
from fastrl.guard import MismatchWatch
from fastrl.health import Health
from fastrl.log import RunLog
from fastrl.metrics import (
    evaluation_metrics,
    lost_grades,
    one_token_rows,
    reward_function_metrics,
    reward_function_sums,
    rollout_metrics,
    rollout_rows,
    rollout_table,
    sampling_mismatch,
)
from fastrl.objectives.base import Objective
from fastrl.perf import memory_metrics
from fastrl.policy import Policy
from fastrl.reference import Reference
from fastrl.rollout import Rollout
from fastrl.schedule import EvalSet, Schedule
from fastrl.types import CheckpointError, Completion, Problem, RolloutGroup, TrainBatch
from fastrl.updates.base import UpdateRule

MAX_FAILED_SAVES = 3  # in a row


class Stopped(Exception):
    """A signal asked for the end; raised between two phases of a step, before anything has been changed."""

    exit_code = 75


class Profiler(Protocol):
    """What `fastrl.profiling.Profiler` is to the trainer: pass rates that may be taken anew in the course of a run."""

    def metrics(self) -> dict[str, float]: ...

    def renew(self, step: int, leave: Callable[[], None]) -> dict[str, float]:
        """Metrics of a profile of the policy after `step` steps, none if no new one is due; leave() may raise."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    policy: Policy
    reference: Reference | None
    critic: Critic | None  # where the objective needs values
    rollout: Rollout
    allocator: Allocation
    objective: Objective
    update: UpdateRule
    completions_per_step: int
    num_minibatches: int
    fitting: Fitting  # cuts microbatches
    schedule: Schedule
    eval_sets: list[EvalSet]
    log: RunLog
    folder: Path
    write_model: Callable[[Path], None]
    config: dict  # the resolved configuration, stored in every checkpoint
    identity: dict[str, str] = field(default_factory=dict)  # fastrl.identity: of what a continuation must have too
    old_from_engine: bool = False  # the engine's log-probabilities are the old ones, where an objective has old ones
    mismatch_watch: MismatchWatch = field(default_factory=MismatchWatch)
    health: Health = field(default_factory=Health)
    memory: Callable[[str], dict[str, float]] = lambda phase: {}  # called when a phase has ended: generate, train
    profiler: Profiler | None = None  # where the objective or the allocation reads a profile
    stop_requested: Callable[[], bool] = lambda: False

    completed: int = field(default=0, init=False)  # steps
    num_rollouts: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)
    num_backward_passes: int = field(default=0, init=False)
    last_checkpoint: Path | None = field(default=None, init=False)
    saved_step: int | None = field(default=None, init=False)  # of the newest checkpoint that this process wrote
    failed_saves: int = field(default=0, init=False)  # in a row
    mismatch: dict[str, float] = field(default_factory=dict, init=False)  # engine against trainer, this step
    broken: dict[str, int] = field(default_factory=dict, init=False)  # numbers of this step that were not finite
    latest: tuple[Problem, Completion] | None = field(default=None, init=False)  # shown now and then
    verdict: str = field(default="", init=False)  # of the newest evaluation: "target", "collapsed", or go on

    def step(self) -> dict[str, float]:
        plan = self.allocator.take(self.completions_per_step)
        groups = self.rollout.run(plan, self.completed)
        used = self.memory("generate")
        self.leave_if_stopped()
        batch = make_batch(
            groups, self.objective.credit, pad_id=self.policy.pad_id, device=self.policy.device,
            max_new_tokens=self.rollout.sampling.max_new_tokens,
        )  # fmt: skip
        with self.rollout.spans("logprobs"):
            self.fill(batch, self.scored(batch))
        self.objective.prepare(batch)
        self.leave_if_stopped()
        self.policy.set_lr(self.policy.optim.lr_at(self.completed, self.schedule.steps))
        self.mismatch = {}
        learned = self.fit_critic(batch) if self.critic else {}
        with self.rollout.spans("update"):
            self.policy.wake()
            parts = [partial(self.accumulate, part) for part in minibatches(batch, self.num_minibatches)]
            metrics = self.update.update(self.policy, parts) | learned | used
            metrics |= self.memory("train")
        self.rollout.engine.weights_changed()
        self.allocator.observe(groups)
        self.keep_refused(groups, batch)
        self.warn(self.mismatch_watch.observe(self.mismatch))
        metrics |= self.observe(groups, batch, metrics)
        if self.warn(self.health.observe(metrics)) and self.schedule.stop_on_collapse:
            self.verdict = "collapsed"
        return metrics

    def scored(self, batch: TrainBatch) -> frozenset[str]:
        """What the objective needs and no other part has; old log-probabilities may be the engine's."""
        needs = self.objective.needs(self.num_minibatches)
        if self.old_from_engine and "old_logprobs" in self.objective.needs(2):
            batch.old_logprobs = batch.rollout_logprobs.clone()
            needs -= {"old_logprobs"}
        return needs

    def fill(self, batch: TrainBatch, needs: frozenset[str]) -> None:
        """Compute what the objective compares with, token by token, without gradients."""
        models = {
            "old_logprobs": self.policy, "current_logprobs": self.policy, "ref_logprobs": self.reference,
            "values": self.critic,
        }  # fmt: skip
        for name in sorted(needs):
            setattr(batch, name, faults.through(name, self.fitting.run(partial(self.scores, models[name], batch))))
        if self.reference:
            self.reference.rest()

    def scores(self, model: Policy | Reference | Critic, batch: TrainBatch) -> torch.Tensor:
        values = torch.zeros_like(batch.rollout_logprobs)
        with torch.no_grad():
            for rows, part in self.fitting.cut(batch, packed=model.packs):
                scores = model.score(part)
                values[rows, : scores.shape[1]] = scores.to(values.dtype)
        return values

    def accumulate(self, minibatch: TrainBatch) -> dict[str, float]:
        """Leave the minibatch's gradient at the current weights in the gradient buffer; return its metrics."""
        # counted once, over all ranks, so the gradient does not depend on how the minibatch is cut further
        count = denominator(minibatch, self.objective.normalizer)
        tokens = denominator(minibatch, "token")
        minibatch.counts = {"token": tokens, "completion": denominator(minibatch, "completion")}
        if self.objective.needs_current:
            self.fill(minibatch, frozenset({"current_logprobs"} if minibatch.old_logprobs is not None else ()))
            self.objective.couple(minibatch)
        sums, seen = self.fitting.run(partial(self.backward, minibatch, count))
        if not self.mismatch:
            self.mismatch = sampling_mismatch((seen - minibatch.rollout_logprobs)[minibatch.response_mask])
        if minibatch.old_logprobs is None:  # then this is the first pass of the step, and the next is not
            minibatch.old_logprobs = seen
        if sums:
            faults.through("loss", sums["loss"])
        metrics = averages(sums, tokens)
        self.policy.loss = metrics["loss"]
        if not math.isfinite(self.policy.loss):
            bad_step.note(self.broken, sums.get("loss"), seen, minibatch.response_mask)
        return metrics

    def backward(self, minibatch: TrainBatch, count: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Add up the gradient, microbatch by microbatch -> sums of the metrics, logprobs [B, S]. No collectives."""
        self.policy.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        seen = torch.zeros_like(minibatch.rollout_logprobs)
        for learns, rows, part in self.microbatches(minibatch):
            faults.at("forward")
            loss, logprobs, metrics = self.forward(part, count, learns)
            if learns:
                loss.backward()
            seen[rows, : logprobs.shape[1]] = logprobs.detach().to(seen.dtype)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        return sums, seen

    def forward(self, part: TrainBatch, count: float, learns: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """A microbatch -> its share of the loss, logprobs [B, S], and metrics summed over response tokens."""
        fused = self.objective.fused(part) if self.policy.fuses and hasattr(self.objective, "fused") else None
        if learns and fused is not None:
            loss, logprobs, metrics = self.policy.fused_loss(part, count, fused)
            return loss, logprobs, {"loss": loss.detach() * part.counts["token"], **metrics}
        with torch.set_grad_enabled(learns):
            logprobs, entropy = self.policy.logprobs(part, need_entropy=True)
            loss, metrics = self.objective.loss_sum(logprobs, entropy, part)
        return loss / count, logprobs, {"loss": loss.detach() * (part.counts["token"] / count), **metrics}

    def fit_critic(self, batch: TrainBatch) -> dict[str, float]:
        """Teach the critic the batch's returns, minibatch by minibatch; return its metrics."""

        def accumulate(part: TrainBatch) -> dict[str, float]:
            tokens = denominator(part, "token")

            def backward() -> dict[str, torch.Tensor]:
                pieces = (piece for _, piece in self.fitting.cut(part, packed=self.critic.packs))
                return self.critic.backward(pieces, self.objective.value_loss_sum, tokens)

            metrics = averages(self.fitting.run(backward), tokens)
            self.critic.loss = metrics["loss"]
            return metrics

        with self.rollout.spans("critic"):
            self.critic.wake()
            self.critic.set_lr(self.critic.optim.lr_at(self.completed, self.schedule.steps))
            metrics = self.critic.fit([partial(accumulate, part) for part in minibatches(batch, self.num_minibatches)])
            self.critic.rest()
            return metrics | {"critic/explained_variance": explained_variance(batch)}

    def keep_refused(self, groups: list[RolloutGroup], batch: TrainBatch) -> None:
        """Close the step for the guards; where one has refused something, keep the batch in the folder `bad`."""
        models = {"policy": self.policy, **({"critic": self.critic} if self.critic else {})}
        reasons = {name: model.guard.end_step(self.completed + 1) for name, model in models.items()}
        if any(reasons.values()):
            grads = {f"{name} gradient": model.own_broken for name, model in models.items() if model.own_broken}
            bad_step.write(self.folder, self.completed + 1, reasons, self.broken | grads, groups, batch)
        self.broken = {}
        for model in models.values():
            model.own_broken = 0

    def warn(self, lines: list[str]) -> list[str]:
        for line in lines:
            self.log.say(line)
        return lines

    def microbatches(self, minibatch: TrainBatch) -> Iterator[tuple[bool, torch.Tensor, TrainBatch]]:
        """(whether there is anything to learn, row indices, rows); rows without a gradient only go forward."""
        silent = self.objective.silent(minibatch)
        for learns, rows in ((True, (~silent).nonzero()[:, 0]), (False, silent.nonzero()[:, 0])):
            pieces = self.fitting.cut(
                select(minibatch, rows), splits_groups=self.objective.splits_groups, packed=self.policy.packs
            )
            yield from ((learns, rows[index], part) for index, part in pieces)

    def observe(self, groups: list[RolloutGroup], batch: TrainBatch, metrics: dict[str, float]) -> dict[str, float]:
        """Count the step and describe what was sampled."""
        table = ranks.gather_rows(rollout_table(groups, first=ranks.rank(), stride=ranks.size()))
        counts = ranks.all_counts({name: float(n) for name, n in self.rollout.statuses.items()})
        self.warn(lost_grades(counts))
        sampled = int(table[:, 2].sum())
        prompts = sum(len(g.problem.prompt_ids) * len(g.completions) for g in groups)
        trained = ranks.all_sum_(torch.tensor([float(prompts)])).item() + sampled
        self.latest = (groups[0].problem, groups[0].completions[0]) if groups else None
        self.completed += 1
        self.num_rollouts += len(table)
        self.num_tokens += int(trained)
        self.num_backward_passes += int(metrics["num_backward_passes"])
        if self.schedule.rollouts_every and self.completed % self.schedule.rollouts_every == 0:
            self.log.rollouts(self.completed, rollout_rows(groups, batch))
        return {
            **rollout_metrics(table),
            "completions/one_token_frac": ranks.all_sum_(one_token_rows(batch).double()).item() / len(table),
            **reward_function_metrics(ranks.all_counts(reward_function_sums(groups))),
            **{f"rewards/status/{name}": n for name, n in counts.items()},
            **{name: total / ranks.size() for name, total in ranks.all_counts(self.rollout.reward_metrics).items()},
            **self.mismatch,
            **self.rollout.canary_metrics,
            "learning_rate": self.policy.optim.lr_at(self.completed - 1, self.schedule.steps),
            "skipped_total": float(self.policy.guard.skipped),
            **({"critic/skipped_total": float(self.critic.guard.skipped)} if self.critic else {}),
            "empty_total": float(self.policy.guard.empty),
            "num_rollouts": self.num_rollouts,
            "num_tokens": self.num_tokens,
            "num_backward_passes": self.num_backward_passes,
            "perf/rollout_tokens_per_s": sampled / max(1e-9, self.rollout.spans.seconds["rollout"]),
            "perf/tokens": trained,
        }

    def run(self) -> str:
        """Train to the end of the schedule; returns why it ended: done, target, collapsed, stopped or time."""
        started, taken, stepping_s = time.monotonic(), 0, 0.0
        if self.completed == 0 and not ranks.all_max(float(self.stop_requested())):
            if self.profiler:
                self.log.metrics(0, self.profiler.metrics())
            self.evaluate()
        while self.completed < self.schedule.steps and not self.verdict:
            before, generators = self.state_dict(), checkpoint.generators()
            try:
                self.leave_if_stopped()
                renewed = self.profiler.renew(self.completed, self.leave_if_stopped) if self.profiler else {}
                begin = time.perf_counter()
                metrics = self.step() | renewed
            except Stopped:
                checkpoint.restore_generators(*generators)  # as if the step had not begun
                if before["step"] != self.saved_step:
                    self.save(before)
                return "stopped"
            elapsed = time.perf_counter() - begin
            taken, stepping_s = taken + 1, stepping_s + elapsed
            metrics = memory_metrics() | metrics | self.rollout.spans.take()
            metrics |= {"step_time": elapsed, "perf/tokens_per_s": metrics.pop("perf/tokens") / elapsed}
            left = self.schedule.steps - self.completed
            self.log.step(self.completed, metrics, left * stepping_s / taken)
            for model in (self.policy, self.critic):
                if model:
                    model.guard.give_up()
            self.every(self.schedule.sample_every, self.show_sample)
            last = self.completed >= self.schedule.steps
            out_of_time = 0 < self.schedule.max_minutes * 60 < time.monotonic() - started
            if last or ranks.all_max(float(out_of_time)):
                break
            self.every(self.schedule.eval_every, self.evaluate)
            self.every(self.schedule.save_every, self.save_or_warn)
        if self.completed != self.saved_step:
            self.save()
        if not self.verdict:
            self.evaluate()
        return self.verdict or ("done" if self.completed >= self.schedule.steps else "time")

    def every(self, interval: int, action: Callable[[], None]) -> None:
        if interval and self.completed % interval == 0:
            action()

    def leave_if_stopped(self) -> None:
        if ranks.all_max(float(self.stop_requested())):
            raise Stopped

    def evaluate(self) -> None:
        """avg@k, pass@k and maj@k of every evaluation set, into the log and onto the console."""
        for eval_set in self.eval_sets:
            start = time.perf_counter()
            self.rollout.spans.enter("eval")
            faults.at("eval")
            with checkpoint.generators_kept():  # how often a run is evaluated must not change how it trains
                _, table = self.rollout.evaluate(eval_set.problems, eval_set.k, eval_set.sampling)
            scores = evaluation_metrics(ranks.gather_rows(table))
            prefix, k = f"eval/{eval_set.name}", eval_set.k
            values = {f"{prefix}/{name}": value for name, value in scores.items()}
            values |= {"num_rollouts": self.num_rollouts, "timing_s/eval": time.perf_counter() - start}
            self.log.metrics(self.completed, values)
            if eval_set is self.eval_sets[0]:
                self.verdict = self.verdict or self.schedule.judge(scores[f"avg@{k}"])
            low, high = scores[f"avg@{k}/ci95_low"], scores[f"avg@{k}/ci95_high"]
            self.log.say(
                f"eval {eval_set.name} at step {self.completed}: avg@{k} {scores[f'avg@{k}']:.3f} "
                f"[{low:.3f}, {high:.3f}]  pass@{k} {scores[f'pass@{k}']:.3f}  maj@{k} {scores[f'maj@{k}']:.3f}  "
                f"len {scores['length']:.1f}  cut off {scores['clipped_ratio']:.3f}"
            )

    def show_sample(self) -> None:
        if self.latest is None:
            return
        problem, completion = self.latest
        prompt = self.policy.tokenizer.decode(problem.prompt_ids)
        self.log.say(
            f"  sample  {prompt[-300:]!r} -> {completion.text[-300:]!r}"
            f"  answer {problem.answer!r}  reward {completion.reward:g}"
        )

    def save(self, state: dict | None = None) -> None:
        """Commit a checkpoint of now, or of `state`. Raises CheckpointError, NumericsError."""
        state = state or self.state_dict()
        with self.rollout.spans("save"):
            self.last_checkpoint = checkpoint.save(
                self.folder / "checkpoints", state["step"], keep=self.schedule.keep, write_model=self.write_model,
                tensors=self.state_tensors(), weights=self.policy.flat.weights, state=state, say=self.log.say,
            )  # fmt: skip
        self.saved_step, self.failed_saves = state["step"], 0

    def save_or_warn(self) -> None:
        """A save between steps: when it fails, the next interval tries again; the third failure in a row is raised."""
        try:
            self.save()
        except CheckpointError as error:
            self.failed_saves += 1
            self.log.metrics(self.completed, {"ckpt/failed_saves": float(self.failed_saves)})
            if self.failed_saves >= MAX_FAILED_SAVES:
                raise
            self.log.say(f"warning: {error}. The run goes on and tries again in {self.schedule.save_every} steps")

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's weights and optimizer states."""
        yield from self.policy.state_tensors()
        if self.critic:
            yield from ((f"critic.{name}", tensor) for name, tensor in self.critic.state_tensors())

    def state_names(self) -> list[str]:
        critic = self.critic.state_names() if self.critic else []
        return [*self.policy.state_names(), *(f"critic.{name}" for name in critic)]

    def state_dict(self) -> dict:
        """Everything but tensors and generators that the next step depends on."""
        return {
            "step": self.completed,
            "num_rollouts": self.num_rollouts,
            "num_tokens": self.num_tokens,
            "num_backward_passes": self.num_backward_passes,
            "tokens_per_microbatch": self.fitting.tokens,
            "policy_version": self.policy.policy_version,
            "engine_policy_version": self.rollout.engine.policy_version,
            "tensors": sorted(self.state_names()),
            "allocator": self.allocator.state_dict(),
            "update": self.update.state_dict(),
            "guard": self.policy.guard.state_dict(),
            "mismatch_watch": self.mismatch_watch.state_dict(),
            "health": self.health.state_dict(),
            **({"critic_guard": self.critic.guard.state_dict()} if self.critic else {}),
            **({"profile": self.profiler.state_dict()} if self.profiler else {}),
            "identity": self.identity,
            "config": self.config,
        }

    def shard_sizes(self) -> dict[str, int]:
        """Elements of this rank's shards, by the prefix of their tensors' names."""
        critic = {"critic.": len(self.critic.master)} if self.critic else {}
        return {"": len(self.policy.master), **critic}

    def load_state_dict(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from a checkpoint. Raises CheckpointError when something is missing from it or of another form."""
        checkpoint.check_form(state, self.state_dict(), "state.json")
        missing = [name for name in ("master", *state["tensors"]) if name not in tensors]
        if missing:
            raise CheckpointError(f"the checkpoint has no {', '.join(missing)}; use one that is complete")
        if self.profiler:
            self.profiler.load_state_dict(state["profile"])  # the allocation makes its schedule from it
        self.allocator.load_state_dict(state["allocator"])
        self.completed = state["step"]
        self.num_rollouts, self.num_tokens = state["num_rollouts"], state["num_tokens"]
        self.num_backward_passes = state["num_backward_passes"]
        if state["config"]["tokens_per_microbatch"] == self.config["tokens_per_microbatch"]:
            self.fitting.tokens = state["tokens_per_microbatch"]  # fewer, if memory has run out since
        self.update.load_state_dict(state["update"])
        self.policy.guard.load_state_dict(state["guard"])
        self.mismatch_watch.load_state_dict(state["mismatch_watch"])
        self.health.load_state_dict(state["health"])
        self.policy.load_state_tensors(tensors)
        if self.critic:
            prefix = "critic."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            self.critic.load_state_tensors(own)
            self.critic.guard.load_state_dict(state["critic_guard"])
        self.policy.policy_version = state["policy_version"]
        self.rollout.engine.policy_version = state["engine_policy_version"]
        self.log.rewind(self.completed or -1)  # a run that has not begun evaluates first, once
