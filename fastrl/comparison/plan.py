"""From a list of methods to runs: what is compared, checked before anything is started."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from fastrl.base.names import did_you_mean
from fastrl.base.setting import check_bounds, setting
from fastrl.comparison.costs import contenders
from fastrl.comparison.methods import Claim, Method, check_names, check_protocol, configuration, from_tables
from fastrl.comparison.runs import Run
from fastrl.models.loading import load_tokenizer, pick_device
from fastrl.settings.flags import expand, flags_of
from fastrl.settings.parse import as_dict, cli, read_toml
from fastrl.settings.run import TrainConfig

PRESETS = {"embedded": Path(__file__).parent.parent / "recipes" / "compare_embedded.toml"}


@dataclass(kw_only=True)
class CompareConfig:
    """Settings of a comparison; the file that lists the methods may hold them too."""

    preset: str = ""  # embedded: the list of methods that comes with fastrl
    args: str = ""  # flags of every run, as typed; a recipe may come first
    baseline: str = "grpo"  # the method that all others are compared with
    target: float = setting(0.85, "(0, 1]", hint="it is a fraction")  # avg@k of the first evaluation set
    seeds: int = setting(5, "[1, 1e6]")  # runs of each method, with --seed 0, 1, ...
    # of the runs that choose learning rates, one after the other
    tuning_seeds: tuple[int, ...] = setting((1000, 1001), "[0, 4e9]")
    # times the method's own --lr; a single one is taken untried
    lr_factors: tuple[float, ...] = setting((0.5, 1.0, 2.0), "(0, 1e6]")
    only: tuple[str, ...] = ()  # these methods and the baseline; all if none
    jobs: int = setting(0, "[0, 1024]")  # runs at a time; 0 = one per core, or one on a GPU
    threads: int = setting(1, "[1, 1024]")  # CPU threads of a run
    out: str = ""  # folder; runs/compare-NAME if empty
    keep_checkpoints: bool = False  # of finished runs, which are deleted otherwise
    dry_run: bool = False  # print the commands, then stop

    def __post_init__(self):
        check_bounds(self)
        if not self.lr_factors or len(set(self.lr_factors)) < len(self.lr_factors):
            raise ValueError(f"--lr-factors must be different numbers above 0, got {self.lr_factors}")
        if not self.tuning_seeds or len(set(self.tuning_seeds)) < len(self.tuning_seeds):
            raise ValueError(f"--tuning-seeds must be one or more different numbers, got {self.tuning_seeds}")
        for seed in self.tuning_seeds:
            if 0 <= seed < self.seeds:
                raise ValueError(
                    f"--tuning-seeds: {seed} is one of the {self.seeds} reported seeds; a learning rate must not be "
                    "chosen by a run that is reported"
                )


@dataclass(kw_only=True)
class Plan:
    config: CompareConfig
    methods: list[Method]
    claims: list[Claim]
    folder: Path
    settings: dict[str, TrainConfig] = field(init=False)  # by method, with the learning rate of its command line

    def __post_init__(self):
        stop = ["--stop-at-accuracy", str(self.config.target)]
        self.settings = {m.name: configuration(m, self.config.args, stop) for m in self.methods}
        check_protocol({name: as_dict(config) for name, config in self.settings.items()})

    @property
    def tuned(self) -> list[Method]:
        return [m for m in self.methods if not m.lr_from]

    @cached_property
    def on_gpu(self) -> bool:
        baseline = self.settings[self.config.baseline]
        return pick_device(baseline.device, baseline.dtype)[0].startswith("cuda")

    @property
    def jobs(self) -> int:
        return self.config.jobs or (1 if self.on_gpu else os.cpu_count() or 1)

    def preload(self) -> Literal["fork", "spawn"]:
        """Import what runs import, so that they need not; returns how they are to be started."""
        if self.on_gpu or sys.platform != "linux":
            return "spawn"
        load_tokenizer(self.settings[self.config.baseline].model)
        return "fork"

    def run(self, method: Method, lr: float, seed: int) -> Run:
        settings = {
            "--stop-at-accuracy": self.config.target,
            "--optim.lr": f"{lr:g}",
            "--seed": seed,
            "--threads": self.config.threads,
            "--sample-every": 0,
            "--rollouts-every": 0,
        }
        args = [*method.command(self.config.args), *(str(word) for pair in settings.items() for word in pair)]
        folder = self.folder / method.name / f"lr-{lr:g}" / f"seed-{seed}"
        return Run(method=method.name, lr=float(f"{lr:g}"), seed=seed, folder=folder, args=tuple(args))

    def grid(self, seed: int, tried: Sequence[dict] = ()) -> list[Run]:
        """The runs that choose learning rates, longest first; tried: what the seeds before gave.

        A rate is tried again only where another may still be better, and never after it has missed the target, unless
        all have.
        """
        runs = []
        for method in self.tuned:
            rates = [float(f"{self.settings[method.name].optim.lr * factor:g}") for factor in self.config.lr_factors]
            rates = contenders(rates, [row for row in tried if row["method"] == method.name])
            runs += [self.run(method, lr, seed) for lr in rates] if len(rates) > 1 else []
        return sorted(runs, key=lambda run: -self.work(run.method))

    def reported(self, chosen: dict[str, float], seconds: dict[str, float]) -> list[Run]:
        """The runs that are compared; those never timed first, then longest first by the seconds of tuning."""
        runs = [
            self.run(m, chosen[m.lr_from or m.name] * m.lr_factor, seed)
            for m in self.methods
            for seed in range(self.config.seeds)
        ]
        return sorted(runs, key=lambda run: (-seconds.get(run.method, float("inf")), -self.work(run.method)))

    def work(self, method: str) -> float:
        """Completions sampled and learned from in all steps: how long a run takes, roughly."""
        config = self.settings[method]
        sampled = config.run.steps * config.allocation.budget(config.problems_per_step)
        return sampled * (1 + config.update.backward_passes)


def read_plan(argv: Sequence[str]) -> Plan:
    """A command line -> a plan. Raises ValueError on whatever cannot be run or compared."""
    argv = list(argv)
    if argv and argv[0].endswith(".toml"):
        source = argv.pop(0)
    else:
        preset = cli(CompareConfig(), expand(argv, CompareConfig()), "the command line").preset
        if preset not in PRESETS:
            hint = did_you_mean(preset, PRESETS, "") if preset else ""
            raise ValueError(
                f"what is to be compared? Name a list of methods, as in `python -m fastrl.compare list.toml`, or "
                f"--preset {' or '.join(PRESETS)}" + (f"; there is no preset {preset!r}{hint}" if preset else "")
            )
        source = str(PRESETS[preset])
    table = read_toml(source)
    methods = from_tables(Method, table.pop("method", []), "method", source)
    claims = from_tables(Claim, table.pop("claim", []), "claim", source)
    default = CompareConfig()
    # `args` begins with a hyphen, so it could not pass through flags
    default.args = table.pop("args", "")
    config = cli(default, flags_of(table, default, source), source)
    config = cli(config, expand(argv, config), "the command line")
    check_names(methods, claims, config.baseline, source)
    if config.only:
        methods, claims = narrowed(methods, claims, config)
    folder = Path(config.out or f"runs/compare-{config.preset or Path(source).stem}")
    return Plan(config=config, methods=methods, claims=claims, folder=folder)


def narrowed(methods: list[Method], claims: list[Claim], config: CompareConfig) -> tuple[list[Method], list[Claim]]:
    """The methods of --only, the baseline, and whose learning rate they take; the claims about these."""
    names = [m.name for m in methods]
    there = f"; there are: {', '.join(names)}"
    for name in config.only:
        if name not in names:
            raise ValueError(f"--only {name}: there is no such method{did_you_mean(name, names, there)}")
    wanted = {config.baseline, *config.only}
    wanted |= {m.lr_from for m in methods if m.name in wanted}
    kept = [m for m in methods if m.name in wanted]
    kept = [replace(m, control_of=m.control_of if m.control_of in wanted else "") for m in kept]
    return kept, [c for c in claims if {c.method, c.against or config.baseline} <= wanted]
