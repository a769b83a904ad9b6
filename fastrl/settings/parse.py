"""Configuration: a TOML recipe and the command line -> dataclasses, which are the objects.

    python -m fastrl.train recipe.toml --objective grpo --optim.lr 1e-4

A recipe is sparse: its sections are the nested dataclasses, `type` picks the member of an axis. The command line wins.
Keys may be short as flags are, with or without their section: fastrl.settings.flags says how. Unknown ones are errors.
"""

import contextlib
import dataclasses
import io
import re
import tomllib
import warnings
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastrl.base.names import did_you_mean
from fastrl.base.setting import Section, has_settings
from fastrl.base.texts import check_texts, refuse_secrets
from fastrl.settings.flags import expand, flags_of, hint, in_full

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def parse(cls: type[T], argv: Sequence[str], axes: dict[str, dict[str, type]]) -> T:
    """argv -> an instance of `cls`; axes: field -> {member name: dataclass}. Raises ValueError on what is unknown."""
    args = list(argv)
    recipe: dict = {}
    source = "the command line"
    refuse_secrets(args, source)
    if args and args[0].endswith(".toml"):
        source = args.pop(0)
        recipe = read_toml(source)
    members = {axis: pick_member(axis, choices, args, recipe, source) for axis, choices in axes.items()}
    default = cls(**{axis: preset(axis, member, args, recipe) for axis, member in members.items()})
    if recipe:
        default = cli(default, flags_of(recipe, default, source), source)
    return cli(default, expand(args, default), "the command line")


def read_toml(path: str) -> dict:
    file = Path(path)
    if not file.exists():
        there = [p.name for p in file.parent.glob("*.toml")]
        raise ValueError(f"{path}: no such recipe{did_you_mean(file.name, there, '')}")
    try:
        return tomllib.loads(file.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def pick_member(axis: str, choices: dict[str, type], args: list[str], recipe: dict, source: str) -> type:
    """The class an axis names in the recipe or, taking the flag out of `args`, on the command line; else its first."""
    section = recipe.get(axis, {})
    if not isinstance(section, dict):
        raise ValueError(f"{source}: {axis} must be a section: write [{axis}] and type = {section!r} under it")
    name = section.pop("type", next(iter(choices)))
    if not isinstance(name, str):
        raise ValueError(f"{source}: type of [{axis}] must be text, got {name!r}; there are: {', '.join(choices)}")
    flag = f"--{axis}"
    rest = list(args)
    args.clear()
    while rest:
        arg = rest.pop(0)
        if arg == flag:
            if not rest:
                raise ValueError(f"{flag} needs a name; there are: {', '.join(choices)}")
            name = rest.pop(0)
        elif arg.startswith(flag + "="):
            name = arg.partition("=")[2]
        else:
            args.append(arg)
    if name not in choices:
        meant = did_you_mean(name, choices, "")
        raise ValueError(f"{flag} {name}: no such member{meant}; there are: {', '.join(choices)}")
    return choices[name]


def preset(axis: str, member: type, args: list[str], recipe: dict) -> object:
    """A member with its defaults, or with those of the preset that the recipe or the command line names.

    What either says of single settings wins over it.
    """
    presets = getattr(member, "PRESETS", {})
    name = recipe.get(axis, {}).get("preset")
    flags = ("--preset", f"--{axis}.preset")
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        flag, equals, value = arg.partition("=")
        if flag in flags:
            name = value if equals else following
    return member(preset=name, **presets[name]) if name in presets else member()


def cli(default: T, args: list[str], source: str) -> T:
    """Parse flags over a default instance; every complaint becomes one ValueError line."""
    import tyro

    refuse_secrets(args, source)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            # a field of an axis is annotated with one member and may hold another: the default's class is what counts
            warnings.filterwarnings("ignore", message="The field .* is annotated with type")
            config, unknown = tyro.cli(
                type(default),
                args=args,
                default=default,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
                registry=settings_only(),
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ValueError(f"{source}: {message(said.getvalue(), default):.1000}; see --help") from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):
            before = [arg for arg in args[: args.index(unknown[0])] if arg.startswith("--")]
            behind = f" behind {before[-1]}" if before else ""
            raise ValueError(f"{source}: {unknown[0]!r} is too much{behind}; see --help")
        raise ValueError(f"{source}: there is no option {flag}{hint(flag, default)}")
    check_texts(config)
    return config


def settings_only():
    """A tyro registry under which state, a field with init=False, is no option, and sections are no part of flags."""
    from tyro.conf import arg
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

    registry, asked = ConstructorRegistry(), []

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        kind = info.type
        if asked or not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
            return None
        asked.append(info)  # so that tyro's own rule answers
        spec = registry.get_struct_spec(info)
        asked.clear()
        assert isinstance(spec, StructConstructorSpec)
        settings = {f.name for f in dataclasses.fields(kind) if f.init}
        fields = [f for f in spec.fields if f.name in settings]
        if issubclass(kind, Section):
            fields = [dataclasses.replace(f, type=Annotated[f.type, arg(prefix_name=False)]) for f in fields]
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def message(said: str, config: "DataclassInstance") -> str:
    """tyro draws boxes with a title and a pointer to the help around its message -> the message alone."""
    words = re.sub(r"[\u2500-\u257f]", " ", re.sub(r"\x1b\[[0-9;]*m", "", said))
    line = " ".join(words.split())
    line = re.sub(r"^(Value error|Missing argument|Invalid choice|Parsing error)\s+", "", line)
    line = re.sub(r"\s*(Argument helptext:.*)?\s*For full helptext.*$", "", line)
    # our own checks name the flag themselves, but not the section that theirs is nested in
    line = re.sub(r"^Error parsing (\S+\.(\w+)): --\2\.", r"--\1.", line)
    line = re.sub(r"^Error parsing \S+: (?=--)", "", line).rstrip(".")
    return re.sub(r"^--\S+", lambda flag: in_full(flag[0], config), line)


def as_dict(config: "DataclassInstance") -> dict:
    """A configuration as JSON can hold it, with the class of what is nested, but for sections, under `type`."""
    out = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        if isinstance(value, Section):
            value = as_dict(value)
        elif has_settings(value):
            value = {"type": type(value).__name__.lower(), **as_dict(value)}
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out
