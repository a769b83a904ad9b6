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
from fastrl.base.bounds import check_bounds
from fastrl.base.log import LOGGERS
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
from fastrl.settings.parse import all_flags, as_dict, nearest, parse
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

    model: str = EMBEDDED  # a Hugging Face model folder or name, or `embedded`
    data: str = "gsm8k"  # a data-set name, or a file or folder of problems
    split: str = "train"
    limit: int = 0  # use only the first problems; 0 = all
    reward: tuple[
        str, ...
    ] = ()  # exact, math or file.py:function, each with an optional :weight; the data set's if none
    reward_workers: int = 2  # processes that grade
    task: TaskConfig = field(default_factory=TaskConfig)

    objective: GRPO = field(default_factory=GRPO)
    update: Single = field(default_factory=Single)
    allocation: Allocation = field(default_factory=Uniform)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)  # where the objective needs values

    problems_per_step: int = 32
    minibatches: int = 1  # optimizer steps per pass over a step's completions
    tokens_per_microbatch: int = (
        0  # per forward and backward, a prompt once per group; 0 = 2048 on a CPU, 16384 on a GPU
    )
    max_new_tokens: int = 512  # a completion is cut off there
    temperature: float = 1.0
    old_logprobs: Literal["recompute", "engine"] = "recompute"  # engine: those it sampled with; saves a forward
    grade_truncated: bool = False  # grade cut-off completions instead of giving them 0

    profile: str = ""  # file, where one is needed; empty: found or made in the folder `profiles` beside the run's
    num_profile_completions: int = 8  # per problem
    reprofile_every: int = 0  # steps between profiles of the policy, for the allocation; 0 = only the first

    steps: int = 200
    max_minutes: float = 0.0  # stop, save and evaluate after this long; 0 = no limit
    eval: tuple[str, ...] = ()  # data sets to evaluate before, after and every eval_every steps
    eval_k: int = 8  # completions per evaluation problem
    eval_every: int = 0
    stop_at_accuracy: float = 0.0  # end the run when avg@k of the first of them reaches it; 0 = never
    stop_below_accuracy: float = 0.0  # or when it is below that: the policy has collapsed; 0 = never
    stop_on_collapse: bool = False  # or at the first warning that the policy collapses or games its reward
    spike_sigma: float = 6.0  # a loss or gradient norm that many deviations above the usual is no step; 0 = it is
    eval_limit: int = 0  # use only the first problems of each; 0 = all
    save_every: int = 0  # steps between checkpoints; one is always written at the end
    keep: int = 2  # newest checkpoints to keep, at least 2

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of weights; auto: bfloat16 on a GPU
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: CheckpointMode = "none"  # selective: keep attention; full: compute all layers again
    master: MasterKind = "float32"  # split: bfloat16 weights and the 16 bits they lack, 4 bytes instead of 6
    offload: Offload = "none"  # optimizer: master and state are on the host while sampling; activations: in the forward
    reference_on_host: bool = False  # its weights are on the device while they score, and on the host otherwise
    liger: bool = False  # Liger's kernels for norms, rotary positions and gated MLPs, on a GPU
    attention: Attention = "sdpa"  # transformers' attn_implementation
    engine: EngineName = "auto"  # hf, vllm; auto: vllm on a GPU where it is installed
    vllm: VllmConfig = field(default_factory=VllmConfig)
    max_num_seqs: int = 512  # completions the engine decodes together
    threads: int = 0  # CPU threads of torch; 0 = its own choice

    name: str = "default"
    out: str = ""  # run folder; runs/NAME if empty
    seed: int = 0
    log: tuple[str, ...] = ()  # tensorboard, wandb; metrics.jsonl is always written
    sample_every: int = 25  # steps between sample completions on the console; 0 = never
    rollouts_every: int = 25  # steps between rollouts/step_N.jsonl files; 0 = never
    resume: str = ""  # auto: the newest checkpoint of the run folder; or a checkpoint folder
    allow_change: tuple[str, ...] = ()  # settings that may differ from the checkpoint's
    hang_timeout: float = 1800.0  # seconds without any progress after which the run ends, with all stacks; 0 = never
    canary: bool = True  # with vLLM, score fixed tokens by both after every update, and stop where they differ
    dry_run: bool = False  # print the resolved configuration and the plan, then stop

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def __post_init__(self):
        check_bounds(
            self, limit="[0, 1e9]", reward_workers="[1, 1024]", problems_per_step="[1, 1e6]", minibatches="[1, 1e6]",
            tokens_per_microbatch="[0, 1e9]", max_new_tokens="[1, 1e7]", num_profile_completions="[1, 1e5]",
            reprofile_every="[0, 1e9]", steps="[1, 1e9]", max_minutes="[0, 1e7]", eval_k="[1, 1e5]",
            eval_every="[0, 1e9]", stop_at_accuracy="[0, 1]", stop_below_accuracy="[0, 1]", eval_limit="[0, 1e9]",
            save_every="[0, 1e9]", keep="[1, 1e6]", max_num_seqs="[1, 1e6]", threads="[0, 1024]", seed="[0, 4e9]",
            sample_every="[0, 1e9]", rollouts_every="[0, 1e9]", spike_sigma="[0, 1e6]", hang_timeout="[0, 1e6]",
        )  # fmt: skip
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name) or set(self.name) == {"."}:
            raise ValueError(f"--name must be 1 to 100 letters, digits, '.', '_' or '-', got {self.name!r}")
        known = {f.name for f in dataclasses.fields(self)} | {f.removeprefix("--") for f in all_flags(self)} | DIGESTS
        known = {name.replace("-", "_") for name in known}
        for name in self.allow_change:
            if name.replace("-", "_") not in known:
                raise ValueError(f"--allow-change {name}: there is no such setting{nearest(name, sorted(known))}")
        if not 0 < self.temperature <= 100:
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
