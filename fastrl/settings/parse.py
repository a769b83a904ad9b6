"""Configuration: a TOML recipe and the command line -> dataclasses, which are the objects.

    python -m fastrl.train recipe.toml --objective grpo --optim.lr 1e-4

A recipe is sparse: sections are the nested dataclasses, `type` picks the member of an axis. The command line wins. A
flag of a nested dataclass may be written by its last word when no other flag, nested no deeper, ends in it: --lr is
--optim.lr and not --critic.optim.lr. Unknown keys and flags are errors that name the nearest one that exists.
"""

import contextlib
import dataclasses
import io
import re
import tomllib
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from fastrl.base.names import did_you_mean, nearest
from fastrl.base.setting import flag_of, settings_of
from fastrl.base.texts import check_texts, check_type, refuse_secrets

T = TypeVar("T")


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
    default = cls(**{axis: member() for axis, member in members.items()})
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
        hint = did_you_mean(name, choices, "")
        raise ValueError(f"{flag} {name}: no such member{hint}; there are: {', '.join(choices)}")
    return choices[name]


def flags_of(recipe: dict, default: object, source: str, prefix: str = "") -> list[str]:
    """A TOML table -> the flags that say the same, so that one parser checks all types."""
    known = {f.name: getattr(default, f.name) for f in dataclasses.fields(default) if f.init}
    hints = typing.get_type_hints(type(default))
    flags = []
    for key, value in recipe.items():
        name = key.replace("-", "_")
        if name not in known:
            hint = elsewhere(name, default) or did_you_mean(name, known)
            raise ValueError(f"{source}: there is no key {prefix + key!r}{hint}")
        flag = f"--{prefix}{name}".replace("_", "-")
        if dataclasses.is_dataclass(known[name]) and not isinstance(value, dict):
            raise ValueError(f"{source}: {prefix}{key} is a section: write [{prefix}{key}] and keys under it")
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(known[name]):
                raise ValueError(f"{source}: {prefix}{key} is a single value, not a section")
            flags += flags_of(value, known[name], source, f"{prefix}{name}.")
            continue
        check_type(f"{source}: {flag}", value, hints[name])
        if isinstance(value, bool):
            flags.append(flag if value else f"--{prefix}no-{name}".replace("_", "-"))
        else:
            values = value if isinstance(value, list) else [value]
            flags += [flag, *(str(v) for v in values)]
    return flags


def all_flags(default: object) -> list[str]:
    """Every flag of a configuration, as it is typed."""
    return [flag_of(path) for path, *_ in settings_of(default)]


def full_flag(typed: str, flags: Sequence[str]) -> str:
    """The flag that `--word` stands for: the only one, among those nested least, that ends in it; itself if none."""
    if typed in flags:
        return typed
    ending = [f for f in flags if f.endswith(f".{typed.removeprefix('--')}")]
    least = [f for f in ending if f.count(".") == min(f.count(".") for f in ending)]
    return least[0] if len(least) == 1 else typed


def short_flag(flag: str, flags: Sequence[str]) -> str:
    """The fewest last words that stand for a flag."""
    words = flag.removeprefix("--").split(".")
    short = (f"--{'.'.join(words[n:])}" for n in reversed(range(len(words))))
    return next(f for f in short if full_flag(f, flags) == flag)


def expand(args: list[str], default: object) -> list[str]:
    """Write out flags that are given by their last word, and put the values of a repeated list flag together."""
    flags = all_flags(default)
    expanded = []
    for arg in args:
        name, equals, value = arg.partition("=")
        typed = name.replace("_", "-")
        if name.startswith("--") and typed not in flags:
            no = typed.startswith("--no-")
            full = full_flag(f"--{typed.removeprefix('--no-')}" if no else typed, flags)
            if full in flags:
                section, dot, last = full.removeprefix("--").rpartition(".")
                name = f"--{section}{dot}{'no-' if no else ''}{last}"
        expanded += [name, value] if equals else [name]
    lists = {flag for flag in flags if isinstance(value_of(default, flag), tuple)}
    merged: dict[str, list[str]] = {}
    kept: list[str] = []
    into = kept
    for arg in expanded:
        if arg.startswith("--"):
            typed = arg.replace("_", "-")
            into = merged.setdefault(typed, []) if typed in lists else kept
            if into is not kept:
                continue
        into.append(arg)
    return kept + [word for flag, values in merged.items() for word in (flag, *values)]


def value_of(default: object, flag: str) -> object:
    """What `--section.name` stands for in a configuration."""
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        default = getattr(default, name)
    return default


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
                type(default), args=args, default=default, return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,), registry=settings_only(),
            )  # fmt: skip
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ValueError(f"{source}: {message(said.getvalue()):.1000}; see --help") from None
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):
            before = [arg for arg in args[: args.index(unknown[0])] if arg.startswith("--")]
            behind = f" behind {before[-1]}" if before else ""
            raise ValueError(f"{source}: {unknown[0]!r} is too much{behind}; see --help")
        hint = elsewhere(flag.lstrip("-").replace("-", "_"), default) or nearest_flag(flag, all_flags(default))
        raise ValueError(f"{source}: there is no option {flag}{hint}")
    check_texts(config)
    return config


def settings_only():
    """A tyro registry under which a field with init=False, state and no setting, is no option."""
    from tyro.constructors import ConstructorRegistry

    registry, asked = ConstructorRegistry(), []

    @registry.struct_rule
    def rule(info):
        if asked or not dataclasses.is_dataclass(info.type):
            return None
        asked.append(info)  # so that tyro's own rule answers
        spec = registry.get_struct_spec(info)
        asked.clear()
        settings = {f.name for f in dataclasses.fields(info.type) if f.init}
        return dataclasses.replace(spec, fields=tuple(f for f in spec.fields if f.name in settings))

    return registry


def message(said: str) -> str:
    """tyro draws boxes with a title and a pointer to the help around its message -> the message alone."""
    words = re.sub(r"[\u2500-\u257f]", " ", re.sub(r"\x1b\[[0-9;]*m", "", said))
    line = " ".join(words.split())
    line = re.sub(r"^(Value error|Missing argument|Invalid choice|Parsing error)\s+", "", line)
    line = re.sub(r"\s*(Argument helptext:.*)?\s*For full helptext.*$", "", line)
    # our own checks name the flag themselves, but not the section that theirs is nested in
    line = re.sub(r"^Error parsing (\S+\.(\w+)): --\2\.", r"--\1.", line)
    return re.sub(r"^Error parsing \S+: (?=--)", "", line).rstrip(".")


def elsewhere(name: str, default: object) -> str:
    """'; here it is called X' for the name that another trainer has for a setting, else an empty string."""
    known = [path for path, field, _ in settings_of(default) if name.lower() in field.metadata.get("known_as", ())]
    least = min(known, key=lambda path: path.count("."), default="")
    return f"; here it is called {short_flag(flag_of(least), all_flags(default))}" if least else ""


def nearest_flag(typed: str, flags: Sequence[str]) -> str:
    """'; did you mean X?' for the flag whose last word is close and, where a section was typed, the section as well."""
    typed = typed.replace("_", "-")
    deepest_first = sorted(flags, key=lambda flag: -flag.count("."))  # so that the least nested keeps the word
    words = {last_word(flag): flag for flag in deepest_first}
    word = last_word(typed)
    if "." in typed and word not in words:
        near = nearest(typed, [flag for flag in flags if nearest(word, [last_word(flag)])])
    else:
        near = words.get(nearest(word, words), "")
    return f"; did you mean {near}?" if near else "; see --help"


def last_word(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2]


def as_dict(config: object) -> dict:
    """A configuration as JSON can hold it, with the class of each nested member under `type`."""
    out = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = {"type": type(value).__name__.lower(), **as_dict(value)}
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out
