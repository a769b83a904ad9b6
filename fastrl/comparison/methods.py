"""What is compared: methods, each a training command line, and claims about them; as a TOML file lists them.

args = "--steps 160 --eval arithmetic --eval-every 5"     flags of every run
baseline = "grpo"

[[method]]
name = "grpo"

[[method]]
name = "sfpo"
args = "--update sfpo"                                    its own flags
headline = "rollouts"                                     the cost by which its learning rate is chosen

[[method]]
name = "grpo-lr3.4"
control_of = "sfpo"                                       a fairness control: what else could explain the gain
lr_from = "sfpo"                                          no grid: the rate chosen for that method ...
lr_factor = 3.4                                           ... times this

[[claim]]
method = "sfpo"
cost = "rollouts"
at_most = 0.45                                            of what `against` (the baseline) needs to the target
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args, get_type_hints

from fastrl.base.names import did_you_mean
from fastrl.base.setting import flag_of
from fastrl.settings.run import AXES, TrainConfig, by_path, configure

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Cost = Literal["rollouts", "backward_passes", "seconds", "tokens"]
COSTS: tuple[str, ...] = get_args(Cost)
# what an accuracy depends on besides the weights
PROTOCOL = (
    "model",
    "eval",
    "eval_k",
    "eval_limit",
    "task",
    "reward",
    "temperature",
    "max_new_tokens",
    "grade_truncated",
)

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    args: str = ""  # flags of fastrl.train, as typed; a recipe may come first
    headline: Cost = "rollouts"  # chooses the learning rate
    control_of: str = ""  # the method whose gain it may explain
    lr_from: str = ""  # takes the learning rate chosen for that method instead of trying a grid
    lr_factor: float = 1.0

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name) or set(self.name) == {"."}:
            raise ValueError(f"a method's name must be 1 to 100 letters, digits, '.', '_' or '-', got {self.name!r}")
        if not self.lr_factor > 0:
            raise ValueError(f"method {self.name}: lr_factor must be above 0, got {self.lr_factor}")
        if self.lr_factor != 1 and not self.lr_from:
            raise ValueError(f"method {self.name}: lr_factor {self.lr_factor:g} of what? Say by lr_from")

    def command(self, common: str) -> list[str]:
        """Arguments of fastrl.train; a recipe of its own takes the place of the common one."""
        first, own = shlex.split(common), shlex.split(self.args)
        if own and own[0].endswith(".toml"):
            return [own[0], *first[bool(first) and first[0].endswith(".toml") :], *own[1:]]
        return [*first, *own]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That `method` needs at most `at_most` times what `against` needs to the target; or passes in each step."""

    method: str
    cost: Literal["rollouts", "backward_passes", "seconds", "tokens", "passes_per_step"]
    against: str = ""  # the baseline, if empty
    at_most: float | None = None  # None: only reported


def from_tables(cls: type[T], tables: object, what: str, source: str) -> list[T]:
    """TOML tables -> dataclasses. Raises ValueError naming the key that is unknown, missing or of another type."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{source}: {what} must be a list of tables: write [[{what}]] above each")
    hints = get_type_hints(cls)
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    there = f"; there are: {', '.join(hints)}"
    made = []
    for number, table in enumerate(tables, start=1):
        where = f"{source}: {what} {table.get('name', number)}"
        for key, value in table.items():
            if key not in hints:
                raise ValueError(f"{where}: there is no key {key!r}{did_you_mean(key, hints, there)}")
            choices = get_args(hints[key]) if hints[key] not in (str, float, float | None) else ()
            if choices and value not in choices:
                raise ValueError(f"{where}: {key} must be one of {', '.join(choices)}, got {value!r}")
            if not choices and isinstance(value, str) != (hints[key] is str):
                raise ValueError(f"{where}: {key} must be {'text' if hints[key] is str else 'a number'}, got {value!r}")
        missing = [key for key in required if key not in table]
        if missing:
            raise ValueError(f"{where}: {missing[0]} is missing")
        made.append(cls(**table))
    return made


def check_names(methods: Sequence[Method], claims: Sequence[Claim], baseline: str, source: str) -> None:
    """Raise ValueError where a name is given twice or stands for no method."""
    names = [m.name for m in methods]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{source}: two methods are called {twice[0]}; every name stands for one")
    mentioned = [("baseline", baseline)]
    mentioned += [(f"method {m.name}: {key}", getattr(m, key)) for m in methods for key in ("control_of", "lr_from")]
    mentioned += [
        (f"claim {n}: {key}", getattr(c, key)) for n, c in enumerate(claims, 1) for key in ("method", "against")
    ]
    there = f"; there are: {', '.join(names)}"
    for where, name in mentioned:
        if name and name not in names:
            raise ValueError(f"{source}: {where} names {name!r}, which is no method{did_you_mean(name, names, there)}")
    tuned = {m.name for m in methods if not m.lr_from}
    for method in methods:
        if method.lr_from and method.lr_from not in tuned:
            raise ValueError(
                f"{source}: method {method.name}: {method.lr_from} has no learning-rate grid of its own; "
                f"lr_from must name one of {', '.join(sorted(tuned))}"
            )


def configuration(method: Method, common: str, extra: Sequence[str]) -> TrainConfig:
    """The configuration of a method's runs. Raises ValueError that names the method."""
    try:
        return configure([*method.command(common), *extra])
    except ValueError as error:
        raise ValueError(f"method {method.name}: {error}") from None


def axis_names(config: TrainConfig) -> dict[str, str]:
    """{"objective": "grpo", "update": ..., "allocation": ...}"""
    return {
        axis: next(name for name, member in members.items() if type(getattr(config, axis)) is member)
        for axis, members in AXES.items()
    }


def check_protocol(settings: dict[str, dict]) -> None:
    """settings: configuration by method. Raises ValueError unless all are evaluated alike."""
    flat = {name: by_path(each) for name, each in settings.items()}
    first, *others = flat
    keys = [key for key in dict.fromkeys(k for each in flat.values() for k in each) if key.split(".")[0] in PROTOCOL]
    for name in others:
        for key in keys:
            here, there = flat[first].get(key), flat[name].get(key)
            if here != there:
                flag = flag_of(key)
                raise ValueError(
                    f"{name} is evaluated with {flag} {there} and {first} with {here}; accuracies are compared under "
                    f"one protocol, so give every method the same {flag}"
                )
