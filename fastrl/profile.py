"""Profile a model on problems: how often it solves each of them, and what the allocations would do with that.

    python -m fastrl.profile                                            embedded model and task
    python -m fastrl.profile --model DIR --data gsm8k --num-completions 8
    python -m fastrl.profile recipe.toml                                as a run of the recipe would make it
    python -m fastrl.profile --show runs/profiles/NAME.jsonl            one that exists; nothing is loaded or sampled

The same command again goes on where an interrupted one stopped. A run with the same settings finds the file by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from fastrl.allocation import ALLOCATORS
from fastrl.base import log, ranks
from fastrl.base.exits import run_program
from fastrl.base.setting import setting
from fastrl.base.types import DataError, Problem
from fastrl.data.task import default_rewards, load_task
from fastrl.engine.opening import frozen_engine
from fastrl.engine.segments import set_segments
from fastrl.models.loading import load_model, load_tokenizer, pick_device
from fastrl.passrates.file import Profile, default_path, read_profile
from fastrl.passrates.key import ProfileKey
from fastrl.passrates.sampling import sample_profile
from fastrl.rewards import RewardSet
from fastrl.settings.flags import expand
from fastrl.settings.job import JobConfig
from fastrl.settings.parse import cli, parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.settings.sections import EngineSection, SamplingSection
from fastrl.step.rollout import Rollout


@dataclass(kw_only=True)
class ProfileConfig(JobConfig):
    """A model on problems it may be trained on."""

    num_completions: int = setting(8, "[1, 1e5]")  # per problem
    threads: int = setting(0, "[0, 1024]")  # CPU threads of torch; 0 = its own choice
    out: str = ""  # file; runs/profiles/<digest of what it depends on>.jsonl if empty
    show: str = ""  # only print this file
    steps: int = setting(200, "[1, 1e9]")  # of the run whose phases are shown

    def __post_init__(self):
        super().__post_init__()
        if not self.sampling.temperature:
            raise ValueError(f"--temperature must be above 0, as in training, got {self.sampling.temperature}")


def configure(argv: Sequence[str]) -> ProfileConfig:
    """Of a recipe, which without --model is that of the embedded run, counts what matters to a profile."""
    args, config = list(argv), ProfileConfig()
    given = {arg.partition("=")[0] for arg in args}
    recipe = args.pop(0) if args and args[0].endswith(".toml") else ""
    if not recipe and not given & {"--model", "--show"}:
        recipe = str(EMBEDDED_RECIPE)
    if recipe:
        config = of_a_run(parse(TrainConfig, [recipe], AXES))
    return cli(config, expand(args, config), "the command line")


def of_a_run(run: TrainConfig) -> ProfileConfig:
    """The profile that the run would make; `out` of a run is a folder, so that of its profile is --profile."""
    shared = {f.name: getattr(run, f.name) for f in fields(JobConfig)}
    shared |= {
        "sampling": SamplingSection(**{f.name: getattr(run.sampling, f.name) for f in fields(SamplingSection)}),
        "engine": EngineSection(**{f.name: getattr(run.engine, f.name) for f in fields(EngineSection)}),
    }
    return ProfileConfig(
        **shared,
        num_completions=run.sampling.num_profile_completions,
        threads=run.threads,
        out=run.sampling.profile,
        steps=run.run.steps,
    )


def make(config: ProfileConfig) -> tuple[Path, Profile]:
    """Sample what the file does not have yet -> the file and the whole profile."""
    config = config.pinned()
    sampling = config.sampling.drawn()
    device, dtype = pick_device(config.device, config.dtype)
    specs = list(config.reward) or default_rewards(config.data)
    with RewardSet(specs, workers=config.reward_workers, timeout_s=config.reward_timeout) as rewards:
        tokenizer = load_tokenizer(config.model)
        task = load_task(config.data, config.split, config.task, tokenizer, rewards, config.limit)
        key = ProfileKey.of(
            model=config.model,
            problems=task.problems,
            rewards=specs,
            sampling=sampling,
            grade_truncated=config.sampling.grade_truncated,
            seed=config.seed,
            num_completions=config.num_completions,
        )
        path = Path(config.out).expanduser() if config.out else default_path(key, Path("runs"))
        say("\n".join([*task.report, f"profile: {path}"]))
        stored = read_profile(path)
        if stored is not None:
            key.refuse_other(stored.key, path)
            if stored.complete:
                return path, stored.first(config.num_completions)
        loaded = load_model(config.model, dtype=dtype, device=device, attention=config.attention, ragged="padded")
        with frozen_engine(config.engine, loaded, task.problems, sampling, config.seed) as engine:
            rollout = Rollout(
                engine=engine,
                rewards=rewards,
                tokenizer=tokenizer,
                eos_ids=loaded.eos_ids,
                sampling=sampling,
                seed=config.seed,
                grade_truncated=config.sampling.grade_truncated,
            )
            return path, sample_profile(rollout, task.problems, key, path, say=say).first(config.num_completions)


def show(file: str) -> tuple[Path, Profile]:
    path = Path(file).expanduser()
    profile = read_profile(path)
    if profile is None or not profile.rows:
        raise DataError(f"--show {file}: there is no profile with a finished chunk; leave --show out to make one")
    return path, profile


def outlooks(profile: Profile, seed: int, steps: int) -> list[str]:
    """What each allocation, with its defaults, would do with the profile."""
    problems = [Problem(id=row["id"], prompt="", answer="") for row in profile.rows]
    profile.fill(problems)
    lines = []
    for name, member in ALLOCATORS.items():
        allocation = member()
        try:
            allocation.start(problems, seed, steps)
            lines.append(f"{name}: {allocation.outlook()}")
        except ValueError as error:
            lines.append(str(error))
    return lines


def say(text: str) -> None:
    if ranks.rank() == 0:
        log.say(text)


def main(argv: list[str]) -> int:
    config = configure(argv)
    if config.threads:
        torch.set_num_threads(config.threads)
    device, _ = pick_device(config.device, config.dtype)
    set_segments(config.engine, device)
    ranks.start(device)
    try:
        path, profile = show(config.show) if config.show else make(config)
        state = "" if profile.complete else f" (unfinished: {len(profile.rows)} of {profile.num_problems} problems)"
        lines = [f"{path}: {profile.summary()}{state}", *profile.histogram()]
        say("\n".join(lines + outlooks(profile, config.seed, config.steps)))
        ranks.barrier()
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    run_program(lambda argv: ranks.end(main(argv)))
