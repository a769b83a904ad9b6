"""The settings of a training run: one dataclass, what is refused, what is decided where a setting is `auto`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import torch

from fastrl.allocation import ALLOCATORS
from fastrl.allocation.base import Allocation
from fastrl.allocation.uniform import Uniform
from fastrl.base import ranks
from fastrl.base.names import did_you_mean
from fastrl.base.setting import Section, flag_of, free_settings, setting
from fastrl.data import pinned_data
from fastrl.models import liger
from fastrl.models.critic import CriticConfig
from fastrl.models.loading import model_config, pick_device
from fastrl.objectives import OBJECTIVES
from fastrl.objectives.grpo import GRPO
from fastrl.settings.flags import find, paths_of
from fastrl.settings.job import JobConfig
from fastrl.settings.parse import parse
from fastrl.settings.sections import (
    EvaluationSection,
    MemorySection,
    RunSection,
    StoppingSection,
    TrainEngine,
    TrainSampling,
)
from fastrl.updates import UPDATES
from fastrl.updates.single import Single
from fastrl.weights.optim import OptimConfig

AXES = {"objective": OBJECTIVES, "update": UPDATES, "allocation": ALLOCATORS}
# of fastrl.run.identity, kept beside the settings
DIGESTS = {"architecture", "problems", "prompts", "reference", "tokenizer"}
EMBEDDED_RECIPE = Path(__file__).parent.parent / "recipes" / "embedded.toml"  # the run of a command without a model


@dataclass(kw_only=True)
class TrainConfig(JobConfig):
    """A run. `--objective`, `--update` and `--allocation` name the member of each axis."""

    objective: GRPO = field(default_factory=GRPO)
    update: Single = field(default_factory=Single)
    allocation: Allocation = field(default_factory=Uniform)
    optim: OptimConfig = field(default_factory=OptimConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)  # where the objective needs values

    problems_per_step: int = setting(32, "[1, 1e6]", known_as="train_batch_size")  # prompts of one step
    minibatches: int = setting(1, "[1, 1e6]")  # optimizer steps per pass over a step's completions
    threads: int = setting(0, "[0, 1024]")  # CPU threads of torch; 0 = its own choice

    sampling: TrainSampling = field(default_factory=TrainSampling)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    stopping: StoppingSection = field(default_factory=StoppingSection)
    memory: MemorySection = field(default_factory=MemorySection)
    engine: TrainEngine = field(default_factory=TrainEngine)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self):
        super().__post_init__()
        may_change(self)  # refuses names that nothing has

    def pinned(self) -> Self:
        sets = tuple(pinned_data(name, self.task.data_dir) for name in self.evaluation.eval)
        return dataclasses.replace(super().pinned(), evaluation=dataclasses.replace(self.evaluation, eval=sets))


SECTIONS = {f.name for f in dataclasses.fields(TrainConfig) if isinstance(f.type, type) and issubclass(f.type, Section)}


def by_path(settings: dict, prefix: str = "") -> dict[str, object]:
    """`as_dict` of a run by path: {"run": {"steps": 9}, "optim": {"lr": 1}} -> {"steps": 9, "optim.lr": 1}."""
    out: dict[str, object] = {}
    for name, value in settings.items():
        if not isinstance(value, dict):
            out[prefix + name] = value
        elif name in SECTIONS and not prefix:
            out |= by_path(value)
        else:
            out |= by_path(value, f"{prefix}{name}.")
    return out


def may_change(config: TrainConfig) -> set[str]:
    """Paths that may differ in a continuation: free ones, and those of --allow-change; a section stands for all of it.

    Raises ValueError on a name that nothing has.
    """
    paths, nested = paths_of(config), {f.name for f in dataclasses.fields(config)} - SECTIONS
    allowed = free_settings(config)
    for typed in config.run.allow_change:
        name = typed.replace("-", "_")
        if name in SECTIONS and not find(name, config):
            allowed |= set(paths_of(getattr(config, name)))
        elif name in nested | DIGESTS:
            allowed.add(name)
        elif path := find(name, config):
            allowed.add(path)
        else:
            meant = did_you_mean(name, [*paths, *SECTIONS, *nested, *DIGESTS])
            raise ValueError(f"--allow-change {typed}: there is no such setting{meant}")
    return allowed


def check_out(out: str) -> None:
    """Raise ValueError where a run folder could not be made, or is the root of something larger."""
    if out and (Path(out).name in ("", "..") or Path(out).expanduser().resolve() in (Path.home(), Path("/"))):
        raise ValueError(f"--out {out}: name a folder of the run's own, such as runs/mine")
    if out and (Path(out).is_file() or any(parent.is_file() for parent in Path(out).parents)):
        raise ValueError(f"--out {out}: there is a file of this name; a run folder must be a folder or new")


C = TypeVar("C", bound=TrainConfig)


def configure(argv: Sequence[str], cls: type[C] = TrainConfig) -> C:
    """The run of a command line; one without a recipe and a model changes the embedded run. cls: it, or with more."""
    given = {arg.partition("=")[0] for arg in argv}
    has_recipe = bool(argv) and argv[0].endswith(".toml")
    config = parse(cls, argv if has_recipe or "--model" in given else [str(EMBEDDED_RECIPE), *argv], AXES)
    check_combination(config)
    return config


def check_combination(config: TrainConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    check_out(config.run.out)
    device, dtype = pick_device(config.device, config.dtype)
    needed, given = config.objective.min_group_size, config.allocation.min_group_size
    if given < needed:
        raise ValueError(
            f"{type(config.objective).__name__} compares at least {needed} completions of a problem, but "
            f"--allocation may sample {given}; raise --group-size"
        )
    if config.optim.name != "adamw" and config.update.per_coordinate:
        raise ValueError(
            f"--optim.name {config.optim.name} moves coordinates in blocks of 8-bit moments, but --update.ratio "
            f"{getattr(config.update, 'ratio', '')} reads them one by one; use --update.ratio tensor, or "
            "--optim.name adamw"
        )
    if config.sampling.old_logprobs == "engine" and getattr(config.objective, "is_correction", "none") != "none":
        raise ValueError(
            f"--is-correction {config.objective.is_correction} weighs by old against the engine's log-probabilities, "
            "which --old-logprobs engine makes equal; leave one of them out"
        )
    if config.memory.checkpoint_activations == "selective" and config.attention == "eager":
        raise ValueError(
            "--checkpoint-activations selective keeps what attention kernels give, and --attention eager has none; use "
            "--attention sdpa, or --checkpoint-activations full"
        )
    if config.memory.liger == "on":
        liger.check(model_config(config.model).model_type, device)
    if config.memory.master == "split" and dtype != torch.bfloat16:
        raise ValueError(
            f"--master split keeps what bfloat16 weights lack of float32, but these are {dtype}; use "
            "--dtype bfloat16, or --master float32"
        )
    for name in ("stop_at_accuracy", "stop_below_accuracy"):
        if getattr(config.stopping, name) and not (config.evaluation.eval and config.evaluation.eval_every):
            raise ValueError(f"{flag_of(name)} looks at evaluations: say of what by --eval, how often by --eval-every")
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
    profile, every = config.sampling.profile, config.sampling.reprofile_every
    if profile and not needs_profile(config):
        raise ValueError(f"--profile {profile}: this objective and this allocation read none; leave it out")
    if every and not config.allocation.needs_profile:
        raise ValueError("--reprofile-every is for an allocation that reads a profile, such as --allocation sgpo")
    if every and config.objective.needs_profile:
        raise ValueError(
            f"--reprofile-every {every}: {type(config.objective).__name__} compares with the rewards "
            "of the model the run starts from, which a profile of the policy would replace; leave it out"
        )


def needs_of(config: TrainConfig) -> frozenset[str]:
    """What the objective compares with: old_logprobs, ref_logprobs, values."""
    return config.objective.needs(config.minibatches)
