"""The order of things: one step, and the run around it. Knows no algorithm."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from fastrl import checkpoint
from fastrl.allocation.base import Allocation
from fastrl.base import faults, ranks
from fastrl.base.log import RunLog
from fastrl.base.spans import memory_metrics
from fastrl.base.types import CheckpointError, Completion, Problem, RolloutGroup, TrainBatch
from fastrl.settings.run import by_path
from fastrl.settings.sections import EvaluationSection, RunSection, StoppingSection
from fastrl.step.batching import make_batch
from fastrl.step.learner import Learner
from fastrl.step.metrics import (
    evaluation_metrics,
    in_order_of_the_plan,
    lost_grades,
    mismatch_of_ranks,
    one_token_rows,
    reward_function_metrics,
    reward_function_sums,
    rollout_metrics,
    rollout_rows,
    rollout_table,
)
from fastrl.step.rollout import EvalSet, Rollout
from fastrl.watch import bad_step
from fastrl.watch.card_watch import CardWatch
from fastrl.watch.health import Health
from fastrl.watch.signal import Signal
from fastrl.weights.guard import MismatchWatch

MAX_FAILED_SAVES = 3  # in a row


class Stopped(Exception):
    """A signal asked for the end; raised between two phases of a step, before anything has been changed."""

    exit_code = 75


class Profiler(Protocol):
    """What `passrates.sampling.Profiler` is to the trainer: pass rates, which may be taken anew during a run."""

    def metrics(self) -> dict[str, float]: ...

    def renew(self, step: int, leave: Callable[[], None]) -> dict[str, float]:
        """Metrics of a profile of the policy after `step` steps, none if no new one is due; leave() may raise."""
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    learner: Learner
    rollout: Rollout
    allocator: Allocation
    completions_per_step: int
    schedule: RunSection
    evaluation: EvaluationSection
    stopping: StoppingSection
    eval_sets: list[EvalSet]
    log: RunLog
    folder: Path
    write_model: Callable[[Path], None]
    config: dict  # the resolved configuration, stored in every checkpoint
    identity: dict[str, str] = field(default_factory=dict)  # fastrl.run.identity: of what a continuation must have too
    mismatch_watch: MismatchWatch = field(default_factory=MismatchWatch)
    health: Health = field(default_factory=Health)
    signal: Signal = field(default_factory=Signal)
    memory: Callable[[str], dict[str, float]] = lambda phase: {}  # called when a phase has ended: generate, train
    card: CardWatch = field(default_factory=CardWatch)
    profiler: Profiler | None = None  # where the objective or the allocation reads a profile
    stop_requested: Callable[[], bool] = lambda: False

    completed: int = field(default=0, init=False)  # steps
    num_rollouts: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)
    num_backward_passes: int = field(default=0, init=False)
    last_checkpoint: Path | None = field(default=None, init=False)
    saved_step: int | None = field(default=None, init=False)  # of the newest checkpoint that this process wrote
    failed_saves: int = field(default=0, init=False)  # in a row
    latest: tuple[Problem, Completion] | None = field(default=None, init=False)  # shown now and then
    verdict: str = field(default="", init=False)  # of the newest evaluation: "target", "collapsed", or go on

    def step(self) -> dict[str, float]:
        learner, spans = self.learner, self.rollout.spans
        plan = self.allocator.take(self.completions_per_step)
        groups = self.rollout.run(plan, self.completed)
        used = self.memory("generate")
        self.leave_if_stopped()
        batch = make_batch(
            groups,
            learner.objective.credit,
            pad_id=learner.policy.pad_id,
            max_new_tokens=self.rollout.sampling.max_new_tokens,
        )
        with spans("logprobs"):
            batch = learner.prepare(batch)
        self.leave_if_stopped()
        learner.set_lr(self.completed, self.schedule.steps)
        if learner.critic:
            with spans("critic"):
                used |= learner.fit_critic(batch)
        with spans("update"):
            learner.policy.wake()
            metrics, batch = learner.learn(batch)
            metrics |= used | self.memory("train")
        self.rollout.engine.weights_changed()
        self.allocator.observe(groups)
        self.keep_refused(groups, batch)
        metrics |= self.compare_engine()
        metrics |= self.observe(groups, batch, metrics)
        if self.warn(self.health.observe(metrics)) and self.stopping.stop_on_collapse:
            self.verdict = "collapsed"
        return metrics

    def keep_refused(self, groups: list[RolloutGroup], batch: TrainBatch) -> None:
        """Close the step for the guards; where one has refused something, keep the batch in the folder `bad`."""
        reasons, broken = self.learner.end_step(self.completed + 1)
        if any(reasons.values()):
            bad_step.write(self.folder, self.completed + 1, reasons, broken, groups, batch)

    def compare_engine(self) -> dict[str, float]:
        """How far engine and trainer were apart in this step, over all ranks. Warns; raises EngineError."""
        parts = ranks.gather((self.learner.mismatch, self.learner.mismatch_tokens))
        found, worst = mismatch_of_ranks(parts)
        self.warn(self.mismatch_watch.observe(worst))
        return found

    def warn(self, lines: list[str]) -> list[str]:
        for line in lines:
            self.log.say(line)
        return lines

    def observe(self, groups: list[RolloutGroup], batch: TrainBatch, metrics: dict[str, float]) -> dict[str, float]:
        """Count the step and describe what was sampled."""
        table = ranks.gather_rows(rollout_table(groups, first=ranks.rank(), stride=ranks.size()))
        counts = ranks.all_counts({name: float(n) for name, n in self.rollout.statuses.items()})
        self.warn(lost_grades(counts))
        self.warn(self.signal.observe(table, counts))
        sampled = int(table[:, 2].sum())
        prompts = sum(len(g.problem.prompt_ids) * len(g.completions) for g in groups)
        trained = ranks.all_sum_(torch.tensor([float(prompts)])).item() + sampled
        self.latest = (groups[0].problem, groups[0].completions[0]) if groups else None
        self.completed += 1
        self.num_rollouts += len(table)
        self.num_tokens += int(trained)
        self.num_backward_passes += int(metrics["num_backward_passes"])
        if self.schedule.rollouts_every and self.completed % self.schedule.rollouts_every == 0:
            self.log.rollouts(self.completed, in_order_of_the_plan(rollout_rows(groups, batch)))
        return {
            **rollout_metrics(table),
            "completions/one_token_frac": ranks.all_sum_(one_token_rows(batch).double()).item() / len(table),
            **reward_function_metrics(ranks.all_counts(reward_function_sums(groups))),
            **{f"rewards/status/{name}": n for name, n in counts.items()},
            **ranks.all_means(self.rollout.reward_metrics),
            **self.rollout.canary_metrics,
            "learning_rate": self.learner.policy.optim.lr_at(self.completed - 1, self.schedule.steps),
            **self.learner.counters(),
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
                self.card.begin_step()
                metrics = self.step() | renewed
            except Stopped:
                checkpoint.restore_generators(*generators)  # as if the step had not begun
                if before["step"] != self.saved_step:
                    self.save(before)
                return "stopped"
            elapsed = time.perf_counter() - begin
            taken, stepping_s = taken + 1, stepping_s + elapsed
            metrics = memory_metrics() | metrics | self.rollout.spans.take() | self.card.end_step()
            metrics |= {"step_time": elapsed, "perf/tokens_per_s": metrics.pop("perf/tokens") / elapsed}
            left = self.schedule.steps - self.completed
            self.log.step(self.completed, metrics, left * stepping_s / taken)
            self.learner.give_up()
            self.every(self.schedule.sample_every, self.show_sample)
            last = self.completed >= self.schedule.steps
            out_of_time = 0 < self.schedule.max_minutes * 60 < time.monotonic() - started
            if last or ranks.all_max(float(out_of_time)):
                break
            self.every(self.evaluation.eval_every, self.evaluate)
            self.every(self.schedule.save_every, self.save_or_warn)
        if self.schedule.save_at_end and self.completed != self.saved_step:
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
                self.verdict = self.verdict or self.stopping.judge(scores[f"avg@{k}"])
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
        prompt = self.learner.policy.tokenizer.decode(problem.prompt_ids)
        self.log.say(
            f"  sample  {prompt[-300:]!r} -> {completion.text[-300:]!r}"
            f"  answer {problem.answer!r}  reward {completion.reward:g}"
        )

    def save(self, state: dict | None = None) -> None:
        """Commit a checkpoint of now, or of `state`. Raises CheckpointError, NumericsError."""
        state = state or self.state_dict()
        with self.rollout.spans("save"):
            self.last_checkpoint = checkpoint.save(
                self.folder / "checkpoints",
                state["step"],
                keep=self.schedule.keep,
                write_model=self.write_model,
                tensors=self.learner.state_tensors(),
                weights=self.learner.policy.flat.weights,
                state=state,
                say=self.log.say,
            )
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

    def state_dict(self) -> dict:
        """Everything but tensors and generators that the next step depends on."""
        return {
            "step": self.completed,
            "num_rollouts": self.num_rollouts,
            "num_tokens": self.num_tokens,
            "num_backward_passes": self.num_backward_passes,
            "engine_policy_version": self.rollout.engine.policy_version,
            **self.learner.state_dict(),
            "allocator": self.allocator.state_dict(),
            "lowest_reward": self.rollout.lowest,
            "mismatch_watch": self.mismatch_watch.state_dict(),
            "health": self.health.state_dict(),
            "signal": self.signal.state_dict(),
            **({"profile": self.profiler.state_dict()} if self.profiler else {}),
            "identity": self.identity,
            "config": self.config,
        }

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
        then, now = (by_path(config).get("tokens_per_microbatch") for config in (state["config"], self.config))
        if then == now:
            self.learner.fitting.tokens = state["tokens_per_microbatch"]  # fewer, if memory has run out since
        self.rollout.lowest = state["lowest_reward"]
        self.mismatch_watch.load_state_dict(state["mismatch_watch"])
        self.health.load_state_dict(state["health"])
        self.signal.load_state_dict(state["signal"])
        self.learner.load_state_dict(state, tensors)
        self.rollout.engine.policy_version = state["engine_policy_version"]
        self.log.rewind(self.completed or -1)  # a run that has not begun evaluates first, once
        self.card.before_kwh = self.log.last("energy/run_kwh")
