"""How settings are typed: --optim.lr in full, --lr in short, --run.steps with its section or --steps without.

A path is what stands behind the hyphens, as in optim.max_grad_norm. Its last word, or last words, are enough where no
other path, nested no deeper, ends in them: --lr is --optim.lr and not --critic.optim.lr.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fastrl.base.names import nearest
from fastrl.base.setting import Section, flag_of, has_settings, settings_of
from fastrl.base.texts import check_type

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def paths_of(config: "DataclassInstance") -> list[str]:
    return [path for path, *_ in settings_of(config)]


def all_flags(config: "DataclassInstance") -> list[str]:
    """Every flag of a configuration, as it is typed in full."""
    return [flag_of(path) for path in paths_of(config)]


def find(typed: str, config: "DataclassInstance") -> str:
    """The path of the setting that is typed so, with hyphens or underscores; empty where there is none."""
    typed = typed.replace("-", "_")
    section, _, rest = typed.partition(".")
    if rest and isinstance(part := getattr(config, section, None), Section):
        return rest if rest in paths_of(part) else ""
    return fullest(typed, paths_of(config))


def fullest(typed: str, paths: Iterable[str]) -> str:
    """The path itself, or the one that, alone among those nested least, ends in it; empty where there is none."""
    ending = [path for path in paths if path == typed or path.endswith(f".{typed}")]
    least = [path for path in ending if path.count(".") == min(other.count(".") for other in ending)]
    return least[0] if len(least) == 1 else ""


def shortest(path: str, paths: list[str]) -> str:
    """The flag with the fewest words that stands for a path."""
    words = path.split(".")
    short = (".".join(words[n:]) for n in reversed(range(len(words))))
    return flag_of(next(typed for typed in short if fullest(typed, paths) == path))


def expand(args: list[str], config: "DataclassInstance") -> list[str]:
    """Flags in full, and the values of a list that is given several times behind one."""
    lists = {flag_of(path) for path, _, value in settings_of(config) if isinstance(value, tuple)}
    merged: dict[str, list[str]] = {}
    kept: list[str] = []
    into = kept
    for arg in args:
        if not arg.startswith("--"):
            into.append(arg)
            continue
        typed, equals, value = arg.partition("=")
        flag = in_full(typed, config)
        into = merged.setdefault(flag, []) if flag in lists else kept
        into += [*([] if flag in lists else [flag]), *([value] if equals else [])]
    return kept + [word for flag, values in merged.items() for word in (flag, *values)]


def in_full(typed: str, config: "DataclassInstance") -> str:
    """--lr -> --optim.lr, --no-cuda-graphs -> --vllm.no-cuda-graphs; what is no flag as it is."""
    section, dot, name = typed.removeprefix("--").replace("_", "-").rpartition(".")
    for no in ("", "no-"):
        if name.startswith(no) and (path := find(section + dot + name.removeprefix(no), config)):
            section, dot, name = flag_of(path).removeprefix("--").rpartition(".")
            return f"--{section}{dot}{no}{name}"
    return typed


def part_at(typed: str, config: "DataclassInstance") -> "DataclassInstance | None":
    """The nested dataclass that a TOML section names; what is nested in a section may be named without it."""
    name, _, rest = typed.replace("-", "_").partition(".")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name) if field.init else None
        if field.name == name and has_settings(value):
            return part_at(rest, value) if rest else value
    sections = (getattr(config, field.name) for field in dataclasses.fields(config) if field.init)
    found = (part_at(typed, section) for section in sections if isinstance(section, Section))
    return next((part for part in found if part is not None), None)


def flags_of(recipe: dict, config: "DataclassInstance", source: str) -> list[str]:
    """A TOML table -> the flags that say the same, so that one parser checks all values. Raises ValueError."""
    fields = {path: field for path, field, _ in settings_of(config)}
    given: dict[str, list[str]] = {}
    for typed, value in keys_of(recipe, config, source):
        path = find(typed, config)
        flag = flag_of(path)
        if path in given:
            raise ValueError(f"{source}: {typed} is given a second time; leave one of them out")
        check_type(f"{source}: {flag}", value, fields[path].type)
        if isinstance(value, bool):
            section, dot, name = flag.removeprefix("--").rpartition(".")
            given[path] = [flag if value else f"--{section}{dot}no-{name}"]
        else:
            given[path] = [flag, *(str(each) for each in (value if isinstance(value, list) else [value]))]
    return [word for words in given.values() for word in words]


def keys_of(table: dict, config: "DataclassInstance", source: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("optim.lr", 1e-6) for every single value of a TOML table, each of which is a setting; else ValueError."""
    for key, value in table.items():
        typed = prefix + key
        part, path = part_at(typed, config), find(typed, config)
        if isinstance(value, dict) and part is not None:
            yield from keys_of(value, config, source, f"{typed}.")
        elif isinstance(value, dict) and path:
            raise ValueError(f"{source}: {typed} is a single value, not a section")
        elif path:
            yield typed, value
        elif part is not None:
            raise ValueError(f"{source}: {typed} is a section: write [{typed}] and keys under it")
        else:
            raise ValueError(f"{source}: there is no key {typed!r}{hint(typed, config, flag=False)}")


def hint(typed: str, config: "DataclassInstance", *, flag: bool = True) -> str:
    """What an unknown flag, or key of a recipe, may have been meant for: '; did you mean X?'."""
    typed = typed.removeprefix("--").replace("-", "_")
    section, _, name = typed.partition(".")
    if name and isinstance(part := getattr(config, section, None), Section):
        typed, config = name, part
    section, _, name = typed.rpartition(".")
    paths = paths_of(config)
    called = [path for path, field, _ in settings_of(config) if name.lower() in field.metadata.get("known_as", ())]
    if called:
        path = min(called, key=lambda path: path.count("."))
        return f"; here it is called {shortest(path, paths)}"
    path = nearest_path(typed, paths)
    key = path.removeprefix(f"{section}.")  # in the section where it was looked for
    return f"; did you mean {flag_of(path) if flag else key}?" if path else "; see --help"


def nearest_path(typed: str, paths: list[str]) -> str:
    """The path whose last word is close and, where a section was typed, the section as well; empty if none is."""
    deepest_first = sorted(paths, key=lambda path: -path.count("."))  # so that the least nested keeps the word
    words = {path.rpartition(".")[2]: path for path in deepest_first}
    word = typed.rpartition(".")[2]
    if "." in typed and word not in words:
        return nearest(typed, [path for path in paths if nearest(word, [path.rpartition(".")[2]])])
    return words.get(nearest(word, words), "")
