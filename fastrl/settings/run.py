"""The settings of a training run: one dataclass, what is refused, what is decided where a setting is `auto`."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastrl import __version__
from fastrl.allocation import ALLOCATORS
from fastrl.allocation.base import Allocation
from fastrl.allocation.uniform import Uniform
from fastrl.base import ranks
from fastrl.base.log import LOGGERS
from fastrl.base.names import did_you_mean
from fastrl.base.setting import check_bounds, setting
from fastrl.data.task import TaskConfig
from fastrl.engine.opening import EngineName
from fastrl.engine.vllm import VllmConfig
from fastrl.models import liger
from fastrl.models.critic import CriticConfig
from fastrl.models.loading import (
    EMBEDDED,
    Attention,
    model_config,
    pick_device,
)
from fastrl.objectives import OBJECTIVES
from fastrl.objectives.grpo import GRPO
from fastrl.settings.parse import all_flags, as_dict, parse
from fastrl.updates import UPDATES
from fastrl.updates.single import Single
from fastrl.weights.activations import CheckpointMode
from fastrl.weights.optim import OptimConfig
from fastrl.weights.shard import MasterKind, Offload

AXES = {"objective": OBJECTIVES, "update": UPDATES, "allocation": ALLOCATORS}
DIGESTS = {"architecture", "problems", "reference", "tokenizer"}  # of fastrl.run.identity, kept beside the settings
EMBEDDED_RECIPE = Path(__file__).parent.parent / "recipes" / "embedded.toml"  # the run of a command without a model


@dataclass(kw_only=True)
class TrainConfig:
    """A run. `--objective`, `--update` and `--allocation` name the member of each axis."""

    model: str = setting(EMBEDDED, known_as="model_name_or_path")  # a Hugging Face model folder or name, or `embedded`
    # a data-set name, or a file or folder of problems
    data: str = setting("gsm8k", known_as=("dataset", "dataset_name"))
    split: str = "train"  # of the data set: train or test
    limit: int = setting(0, "[0, 1e9]")  # use only the first problems; 0 = all
    # exact, math or file.py:function, each with an optional :weight; the data set's if none
    reward: tuple[str, ...] = setting((), known_as="reward_funcs")
    reward_workers: int = setting(2, "[1, 1024]", free=True)  # processes that grade
    task: TaskConfig = field(default_factory=TaskConfig)

    objective: GRPO = field(default_factory=GRPO)
    update: Single = field(default_factory=Single)
    allocation: Allocation = field(default_factory=Uniform)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)  # where the objective needs values

    problems_per_step: int = setting(32, "[1, 1e6]", known_as="train_batch_size")  # prompts of one step
    minibatches: int = setting(1, "[1, 1e6]")  # optimizer steps per pass over a step's completions
    # per forward and backward, a prompt once per group; 0 = 2048 on a CPU, 16384 on a GPU
    tokens_per_microbatch: int = setting(0, "[0, 1e9]", known_as="per_device_train_batch_size")
    max_new_tokens: int = setting(512, "[1, 1e7]", known_as="max_completion_length")  # a completion is cut off there
    temperature: float = setting(1.0, "[0, 100]")  # of sampling, and of the log-probabilities that are trained
    old_logprobs: Literal["recompute", "engine"] = "recompute"  # engine: those it sampled with; saves a forward
    grade_truncated: bool = False  # grade cut-off completions instead of giving them 0

    # file, where one is needed; empty: found or made in the folder `profiles` beside the run's
    profile: str = setting("", free=True)
    num_profile_completions: int = setting(8, "[1, 1e5]")  # per problem
    # steps between profiles of the policy, for the allocation; 0 = only the first
    reprofile_every: int = setting(0, "[0, 1e9]")

    steps: int = setting(200, "[1, 1e9]", free=True, known_as="max_steps")  # of training
    max_minutes: float = setting(0.0, "[0, 1e7]", free=True)  # stop, save and evaluate after this long; 0 = no limit
    eval: tuple[str, ...] = setting((), free=True)  # data sets to evaluate before, after and every eval_every steps
    eval_k: int = setting(8, "[1, 1e5]", free=True)  # completions per evaluation problem
    # steps between evaluations; 0 = only before and after
    eval_every: int = setting(0, "[0, 1e9]", free=True, known_as="eval_steps")
    # end the run when avg@k of the first of them reaches it; 0 = never
    stop_at_accuracy: float = setting(0.0, "[0, 1]", free=True)
    # or when it is below that: the policy has collapsed; 0 = never
    stop_below_accuracy: float = setting(0.0, "[0, 1]", free=True)
    # or at the first warning that the policy collapses or games its reward
    stop_on_collapse: bool = setting(False, free=True)
    # a loss or gradient norm that many deviations above the usual is no step; 0 = it is
    spike_sigma: float = setting(6.0, "[0, 1e6]")
    eval_limit: int = setting(0, "[0, 1e9]", free=True)  # use only the first problems of each; 0 = all
    # steps between checkpoints; one is always written at the end
    save_every: int = setting(0, "[0, 1e9]", free=True, known_as="save_steps")
    keep: int = setting(2, "[1, 1e6]", free=True, known_as="save_total_limit")  # newest checkpoints to keep, at least 2

    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of weights; auto: bfloat16 on a GPU
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # of the gradient buffer
    # selective: keep attention; full: compute all layers again
    checkpoint_activations: CheckpointMode = setting("none", known_as="gradient_checkpointing")
    master: MasterKind = "float32"  # split: bfloat16 weights and the 16 bits they lack, 4 bytes instead of 6
    # optimizer: master and state are on the host while sampling; activations: in the forward
    offload: Offload = setting("none", free=True)
    # its weights are on the device while they score, and on the host otherwise
    reference_on_host: bool = setting(False, free=True)
    liger: bool = False  # Liger's kernels for norms, rotary positions and gated MLPs, on a GPU
    attention: Attention = "sdpa"  # transformers' attn_implementation
    engine: EngineName = "auto"  # hf, vllm; auto: vllm on a GPU where it is installed
    vllm: VllmConfig = field(default_factory=VllmConfig)
    max_num_seqs: int = setting(512, "[1, 1e6]", free=True)  # completions the engine decodes together
    threads: int = setting(0, "[0, 1024]")  # CPU threads of torch; 0 = its own choice

    name: str = setting("default", free=True)  # of the run
    out: str = setting("", free=True, known_as="output_dir")  # run folder; runs/NAME if empty
    seed: int = setting(0, "[0, 4e9]")  # of sampling, of the order of problems and of the generators
    # tensorboard, wandb; metrics.jsonl is always written
    log: tuple[str, ...] = setting((), free=True, known_as="report_to")
    sample_every: int = setting(25, "[0, 1e9]", free=True)  # steps between sample completions on the console; 0 = never
    rollouts_every: int = setting(25, "[0, 1e9]", free=True)  # steps between rollouts/step_N.jsonl files; 0 = never
    # auto: the newest checkpoint of the run folder; or a checkpoint folder
    resume: str = setting("", free=True, known_as="resume_from_checkpoint")
    allow_change: tuple[str, ...] = setting((), free=True)  # settings that may differ from the checkpoint's
    # seconds without any progress after which the run ends, with all stacks; 0 = never
    hang_timeout: float = setting(1800.0, "[0, 1e6]", free=True)
    # with vLLM, score fixed tokens by both after every update, and stop where they differ
    canary: bool = setting(True, free=True)
    dry_run: bool = setting(False, free=True)  # print the resolved configuration and the plan, then stop

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def __post_init__(self):
        check_bounds(self)
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name) or set(self.name) == {"."}:
            raise ValueError(f"--name must be 1 to 100 letters, digits, '.', '_' or '-', got {self.name!r}")
        known = {f.name for f in dataclasses.fields(self)} | {f.removeprefix("--") for f in all_flags(self)} | DIGESTS
        known = {name.replace("-", "_") for name in known}
        for name in self.allow_change:
            if name.replace("-", "_") not in known:
                raise ValueError(f"--allow-change {name}: there is no such setting{did_you_mean(name, sorted(known))}")
        if not self.temperature:
            raise ValueError(f"--temperature must be above 0 in training, got {self.temperature}")
        if 0 < self.stop_at_accuracy <= self.stop_below_accuracy:
            raise ValueError(
                f"--stop-below-accuracy {self.stop_below_accuracy} must be below --stop-at-accuracy "
                f"{self.stop_at_accuracy}, or every evaluation ends the run"
            )
        unknown = set(self.log) - set(LOGGERS)
        if unknown:
            raise ValueError(
                f"--log {unknown.pop()}: there is {' and '.join(LOGGERS)}; metrics.jsonl is always written"
            )


def check_out(out: str) -> None:
    """Raise ValueError where a run folder could not be made, or is the root of something larger."""
    if out and (Path(out).name in ("", "..") or Path(out).expanduser().resolve() in (Path.home(), Path("/"))):
        raise ValueError(f"--out {out}: name a folder of the run's own, such as runs/mine")
    if out and (Path(out).is_file() or any(parent.is_file() for parent in Path(out).parents)):
        raise ValueError(f"--out {out}: there is a file of this name; a run folder must be a folder or new")


def configure(argv: Sequence[str], cls: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """The run of a command line; one without a recipe and a model changes the embedded run. cls: it, or with more."""
    given = {arg.partition("=")[0] for arg in argv}
    has_recipe = bool(argv) and argv[0].endswith(".toml")
    config = parse(cls, argv if has_recipe or "--model" in given else [str(EMBEDDED_RECIPE), *argv], AXES)
    check_combination(config)
    return config


def check_combination(config: TrainConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    check_out(config.out)
    needed, given = config.objective.min_group_size, config.allocation.min_group_size
    if given < needed:
        raise ValueError(
            f"{type(config.objective).__name__} compares at least {needed} completions of a problem, but "
            f"--allocation may sample {given}; raise --group-size"
        )
    if config.optim.name != "adamw" and config.update.per_coordinate:
        raise ValueError(
            f"--optim.name {config.optim.name} moves coordinates in blocks of 8-bit moments, but --update.ratio "
            f"{config.update.ratio} reads them one by one; use --update.ratio tensor, or --optim.name adamw"
        )
    if config.old_logprobs == "engine" and getattr(config.objective, "is_correction", "none") != "none":
        raise ValueError(
            f"--is-correction {config.objective.is_correction} weighs by old against the engine's log-probabilities, "
            "which --old-logprobs engine makes equal; leave one of them out"
        )
    if config.checkpoint_activations == "selective" and config.attention == "eager":
        raise ValueError(
            "--checkpoint-activations selective keeps what attention kernels give, and --attention eager has none; use "
            "--attention sdpa, or --checkpoint-activations full"
        )
    if config.liger:
        liger.check(model_config(config.model).model_type, resolve(config)[0])
    if config.master == "split" and resolve(config)[1] != torch.bfloat16:
        raise ValueError(
            f"--master split keeps what bfloat16 weights lack of float32, but these are {resolve(config)[1]}; use "
            "--dtype bfloat16, or --master float32"
        )
    for name in ("stop_at_accuracy", "stop_below_accuracy"):
        if getattr(config, name) and not (config.eval and config.eval_every):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} looks at evaluations: say of what by --eval, how often by --eval-every")
    fewest = config.allocation.budget(config.problems_per_step) // config.allocation.max_group_size
    per_rank = fewest // ranks.world_size()
    if config.minibatches > per_rank:
        raise ValueError(
            f"--minibatches {config.minibatches} cannot be cut from --problems-per-step {fewest}; "
            f"a minibatch holds whole groups, and a rank has {per_rank}"
        )
    check_profile(config)


def needs_profile(config: TrainConfig) -> bool:
    return config.objective.needs_profile or config.allocation.needs_profile


def check_profile(config: TrainConfig) -> None:
    """Refuse settings of a profile that have no use here."""
    if config.profile and not needs_profile(config):
        raise ValueError(f"--profile {config.profile}: this objective and this allocation read none; leave it out")
    if config.reprofile_every and not config.allocation.needs_profile:
        raise ValueError("--reprofile-every is for an allocation that reads a profile, such as --allocation sgpo")
    if config.reprofile_every and config.objective.needs_profile:
        raise ValueError(
            f"--reprofile-every {config.reprofile_every}: {type(config.objective).__name__} compares with the rewards "
            "of the model the run starts from, which a profile of the policy would replace; leave it out"
        )


def resolve(config: TrainConfig) -> tuple[str, torch.dtype, int]:
    """-> device, dtype and tokens per microbatch, with `auto` and 0 decided."""
    device, dtype = pick_device(config.device, config.dtype)
    return device, dtype, config.tokens_per_microbatch or (16384 if device.startswith("cuda") else 2048)


def describe(config: TrainConfig, device: str, tokens_per_microbatch: int) -> list[str]:
    """The lines that say what will be trained and how, every constant in force among them."""

    def settings(member: object) -> str:
        return " ".join(f"{k}={v}" for k, v in as_dict(member).items())

    budget = config.allocation.budget(config.problems_per_step)
    groups = {budget // size for size in (config.allocation.max_group_size, config.allocation.min_group_size)}
    name = {
        axis: next(n for n, cls in members.items() if type(getattr(config, axis)) is cls)
        for axis, members in AXES.items()
    }
    return [
        f"fastrl {__version__}  device={device}  model={config.model}  data={config.data}  seed={config.seed}",
        f"objective: {name['objective']}  {settings(config.objective)}",
        f"update: {name['update']} {settings(config.update)}   allocation: {name['allocation']} "
        f"{settings(config.allocation)}   optim: {settings(config.optim)}",
        *([f"critic: passes={config.critic.passes} {settings(config.critic.optim)}"] if needs_values(config) else []),
        f"batch: {' to '.join(map(str, sorted(groups)))} problems, {budget} completions -> {config.minibatches} "
        f"minibatches -> microbatches of <= {tokens_per_microbatch} tokens; {config.steps} steps",
    ]


def needs_values(config: TrainConfig) -> bool:
    return "values" in config.objective.needs(num_minibatches=2)
