"""Profile a model on problems: how often it solves each of them, and what the allocations would do with that.

    python -m fastrl.profile                                            embedded model and task
    python -m fastrl.profile --model DIR --data gsm8k --num-completions 8
    python -m fastrl.profile recipe.toml                                as a run of the recipe would make it
    python -m fastrl.profile --show runs/profiles/NAME.jsonl            one that exists; nothing is loaded or sampled

The same command again goes on where an interrupted one stopped. A run with the same settings finds the file by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from fastrl.allocation import ALLOCATORS
from fastrl.base import log, ranks
from fastrl.base.exits import run_program
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import DataError, Problem
from fastrl.data.task import TaskConfig, default_rewards, load_task
from fastrl.engine.base import Sampling
from fastrl.engine.opening import EngineName, frozen_engine
from fastrl.engine.vllm import VllmConfig
from fastrl.models.loading import EMBEDDED, Attention, load_model, load_tokenizer, pick_device
from fastrl.passrates.file import Profile, ProfileKey, default_path, read_profile
from fastrl.passrates.sampling import sample_profile
from fastrl.rewards import RewardSet
from fastrl.settings.parse import cli, expand, flags_of, read_toml
from fastrl.settings.run import EMBEDDED_RECIPE
from fastrl.step.rollout import Rollout

OF_A_RUN = {"profile": "out", "num_profile_completions": "num_completions"}  # keys of a recipe -> what they are here


@dataclass(kw_only=True)
class ProfileConfig:
    model: str = EMBEDDED  # a Hugging Face model folder or name, or `embedded`
    data: str = "gsm8k"  # a data-set name, or a file or folder of problems
    split: str = "train"  # of the data set: train or test
    limit: int = setting(0, "[0, 1e9]")  # use only the first problems; 0 = all
    reward: tuple[str, ...] = ()  # as in training; the data set's if none
    reward_workers: int = setting(2, "[1, 1024]")  # processes that grade
    task: TaskConfig = field(default_factory=TaskConfig)
    num_completions: int = setting(8, "[1, 1e5]")  # per problem
    max_new_tokens: int = setting(512, "[1, 1e7]")  # a completion is cut off there
    temperature: float = setting(1.0, "[0, 100]")  # of sampling
    grade_truncated: bool = False  # grade cut-off completions instead of giving them 0
    seed: int = setting(0, "[0, 4e9]")  # of sampling
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of weights; auto: bfloat16 on a GPU
    attention: Attention = "sdpa"  # transformers' attn_implementation
    engine: EngineName = "auto"  # hf, vllm; auto: vllm on a GPU where it is installed
    vllm: VllmConfig = field(default_factory=VllmConfig)
    max_num_seqs: int = setting(512, "[1, 1e6]")  # completions the engine decodes together
    threads: int = setting(0, "[0, 1024]")  # CPU threads of torch; 0 = its own choice
    out: str = ""  # file; runs/profiles/<digest of what it depends on>.jsonl if empty
    show: str = ""  # only print this file
    steps: int = setting(200, "[1, 1e9]")  # of the run whose phases are shown

    def __post_init__(self):
        check_bounds(self)
        if not self.temperature:
            raise ValueError(f"--temperature must be above 0, as in training, got {self.temperature}")


def configure(argv: Sequence[str]) -> ProfileConfig:
    """Of a recipe, which without --model is that of the embedded run, counts what matters to a profile."""
    args, config = list(argv), ProfileConfig()
    given = {arg.partition("=")[0] for arg in args}
    recipe = args.pop(0) if args and args[0].endswith(".toml") else ""
    if not recipe and not given & {"--model", "--show"}:
        recipe = str(EMBEDDED_RECIPE)
    if recipe:
        known = {f.name for f in fields(config)} - {"out"}  # in a recipe that is the run's folder
        settings = {key.replace("-", "_"): value for key, value in read_toml(recipe).items()}
        mine = {key: value for key, value in settings.items() if key in known}
        mine |= {OF_A_RUN[key]: value for key, value in settings.items() if key in OF_A_RUN}
        config = cli(config, flags_of(mine, config, recipe), recipe)
    return cli(config, expand(args, config), "the command line")


def make(config: ProfileConfig) -> tuple[Path, Profile]:
    """Sample what the file does not have yet -> the file and the whole profile."""
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    device, dtype = pick_device(config.device, config.dtype)
    specs = list(config.reward) or default_rewards(config.data)
    with RewardSet(specs, workers=config.reward_workers) as rewards:
        tokenizer = load_tokenizer(config.model)
        task = load_task(config.data, config.split, config.task, tokenizer, rewards, config.limit)
        key = ProfileKey.of(
            model=config.model, problems=task.problems, rewards=specs, sampling=sampling,
            grade_truncated=config.grade_truncated, seed=config.seed, num_completions=config.num_completions,
        )  # fmt: skip
        path = Path(config.out).expanduser() if config.out else default_path(key, Path("runs"))
        say("\n".join([*task.report, f"profile: {path}"]))
        stored = read_profile(path)
        if stored is not None:
            key.refuse_other(stored.key, path)
            if stored.complete:
                return path, stored.first(config.num_completions)
        loaded = load_model(config.model, dtype=dtype, device=device, attention=config.attention)
        opened = frozen_engine(
            config.engine, loaded, config.vllm, task.problems, sampling, max_num_seqs=config.max_num_seqs,
            seed=config.seed,
        )  # fmt: skip
        with opened as engine:
            rollout = Rollout(
                engine=engine, rewards=rewards, tokenizer=tokenizer, sampling=sampling, seed=config.seed,
                grade_truncated=config.grade_truncated,
            )  # fmt: skip
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
    ranks.start(pick_device(config.device, config.dtype)[0])
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
