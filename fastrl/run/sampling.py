"""What a run samples with: its engine, what grades, and the profile that its objective or its allocation reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastrl.base import ranks
from fastrl.base.log import RunLog
from fastrl.base.spans import Spans
from fastrl.base.types import Problem
from fastrl.data.task import default_rewards
from fastrl.engine.base import Engine
from fastrl.engine.opening import EngineSize, open_engine
from fastrl.engine.vllm import VllmEngine
from fastrl.models.shapes import NoPlan
from fastrl.passrates.file import find_profile
from fastrl.passrates.key import ProfileKey
from fastrl.passrates.sampling import Profiler
from fastrl.rewards import RewardSet
from fastrl.run.models import Models
from fastrl.run.problems import Work, longest_sequence
from fastrl.run.resolve import Resolved
from fastrl.settings.run import TrainConfig, needs_profile
from fastrl.step.canary import Canary
from fastrl.step.rollout import Rollout
from fastrl.step.trainer import Stopped


def open_rewards(config: TrainConfig) -> RewardSet:
    """The verifiers and reward functions of a run. Raises ValueError on a spec that cannot be used."""
    specs = list(config.reward) or default_rewards(config.data)
    return RewardSet(specs, workers=config.reward_workers, timeout_s=config.reward_timeout)


def make_engine(resolved: Resolved, models: Models, max_model_len: int, log: RunLog) -> Engine:
    config = resolved.config
    kv_bytes = int(config.engine.vllm.kv_gib * 2**30)
    if resolved.engine == "vllm" and not kv_bytes and resolved.cuda:
        if isinstance(resolved.plan, NoPlan):
            raise ValueError(f"--vllm.kv-gib must be given, for the memory of this model has no plan: {resolved.plan}")
        kv_bytes = resolved.plan.kv_bytes
    sized = EngineSize(max_model_len=max_model_len, kv_bytes=kv_bytes, seed=config.seed + ranks.rank())
    engine = open_engine(resolved.engine, models.loaded, models.policy.flat, config.engine, sized)
    size = f" with {kv_bytes / 2**30:.1f} GiB of KV cache" if kv_bytes else ""
    if isinstance(engine, VllmEngine):
        log.say(f"engine: vLLM {engine.version}, {engine.how}, over the trainer's weights{size}")
    else:
        log.say(f"engine: {resolved.engine}")
    return engine


def make_rollout(
    resolved: Resolved, models: Models, work: Work, rewards: RewardSet, spans: Spans, log: RunLog
) -> Rollout:
    config = resolved.config
    longest = longest_sequence(config, work.problems, models.loaded)
    engine = make_engine(resolved, models, longest, log)
    canary = None
    if config.engine.canary and isinstance(engine, VllmEngine):  # the other engine has no weights of its own
        canary = Canary.of(engine, models.policy, config.sampling.temperature, work.task.problems, longest).check
    return Rollout(
        spans=spans,
        engine=engine,
        rewards=rewards,
        tokenizer=models.loaded.tokenizer,
        eos_ids=models.loaded.eos_ids,
        seed=config.seed,
        sampling=config.sampling.drawn(),
        grade_truncated=config.sampling.grade_truncated,
        canary=canary,
        make_room=models.rest,
    )


@dataclass(frozen=True, kw_only=True)
class WantedProfile:
    """What the run's profile depends on, its file, and a line that says what is in it."""

    key: ProfileKey
    path: Path
    said: str


def wanted_profile(config: TrainConfig, problems: list[Problem]) -> WantedProfile | None:
    """None where neither the objective nor the allocation reads one. Raises ValueError for one of another run."""
    if not needs_profile(config):
        return None
    key = ProfileKey.of(
        model=config.model,
        problems=problems,
        rewards=config.reward or default_rewards(config.data),
        sampling=config.sampling.drawn(),
        grade_truncated=config.sampling.grade_truncated,
        seed=config.seed,
        num_completions=config.sampling.num_profile_completions,
    )
    path, said = find_profile(key, config.sampling.profile, config.run.folder.parent)
    return WantedProfile(key=key, path=path, said=said)


def make_profiler(
    config: TrainConfig, wanted: WantedProfile, rollout: Rollout, work: Work, models: Models, log: RunLog
) -> Profiler:
    return Profiler(
        rollout=rollout,
        problems=work.task.problems,
        allocation=config.allocation,
        key=wanted.key,
        path=wanted.path,
        folder=config.run.folder,
        every=config.sampling.reprofile_every,
        say=log.say,
        weights=lambda: models.policy.flat.weights,
    )


def leave_if_stopped(stop_requested: Callable[[], bool]) -> None:
    if ranks.all_max(float(stop_requested())):
        raise Stopped("stopped while the profile was being sampled; the same command goes on from there")
