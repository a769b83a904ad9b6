"""Configurations that cannot be meant: each is one message that names the key, exit code 2, and nothing is started."""

import dataclasses
import functools
import inspect
import json
import math
import re
import typing

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastrl.base.exits import exit_code
from fastrl.base.setting import flag_of, outside, settings_of
from fastrl.base.texts import check_type
from fastrl.comparison.plan import CompareConfig
from fastrl.doctor import DoctorConfig
from fastrl.evaluate import EvaluateConfig
from fastrl.plan import PlanConfig
from fastrl.profile import ProfileConfig
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig, configure

# numbers without an upper or lower limit: no limit is a meaning of theirs
SENSIBLE = [
    ["--steps", "7"],
    ["--lr", "3e-5"],
    ["--eval-limit", "8"],
    ["--seed", "11"],
    ["--problems-per-step", "16"],
    [],
]
NO_NUMBER = [
    "",
    " ",
    "nan",
    "NaN",
    "word",
    "1e-6x",
    "0x10",
    "1,5",
    "--1",
    "1..2",
    "[1]",
    "None.",
    "\u0663x",
    "1e",
    "$HOME",
]
NO_INTEGER = ["1.5", "1e-6", "inf", "9" * 5000, "True"]
EXTREME = ["-1", "1e300", "1" + "0" * 308, "-1e300", "inf", "-inf"]
UNHEARD = st.text("abcdefghijklmnopqrstuvwxyz_-0123456789", min_size=1, max_size=30)


def kinds(hint: object) -> set:
    """int, float, str, bool and Literal among the types of an annotation."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return {typing.Literal}
    return {hint} if origin is None else set().union(*(kinds(arg) for arg in typing.get_args(hint)))


@functools.cache
def flags_with(objective: str, update: str, allocation: str) -> dict[str, dataclasses.Field]:
    members = {"objective": objective, "update": update, "allocation": allocation}
    default = TrainConfig(**{axis: AXES[axis][name]() for axis, name in members.items()})
    return {flag_of(path): field for path, field, _ in settings_of(default)}


def allowed(number: float, field: dataclasses.Field) -> bool:
    """Whether the bounds of a setting say so; a number without bounds allows none of those tried here."""
    bounds = field.metadata.get("bounds", "")
    return bool(bounds) and not outside(number, bounds)


def bad_numbers(field: dataclasses.Field, kind: type) -> list[str]:
    extreme = [text for text in EXTREME if not allowed(float(text), field)]
    return NO_NUMBER + (NO_INTEGER if kind is int else []) + extreme


@st.composite
def bad_settings(draw) -> tuple[list[str], dict, str]:
    """-> arguments, a recipe, and the word that the message must hold."""
    members = {axis: draw(st.sampled_from(sorted(choices))) for axis, choices in AXES.items()}
    flags = flags_with(**members)
    axes = [word for axis, name in members.items() for word in (f"--{axis}", name)]
    args = axes + draw(st.sampled_from(SENSIBLE))
    what = draw(st.sampled_from(["number", "number", "number", "text", "choice", "unknown", "member", "extra", "toml"]))
    if what == "unknown":
        key = draw(UNHEARD.filter(lambda key: not any(f.endswith(key.replace("_", "-").strip("-")) for f in flags)))
        return [*args, f"--x{key}", "1"], {}, f"--x{key}"
    if what == "member":
        axis = draw(st.sampled_from(sorted(AXES)))
        return [*SENSIBLE[0], f"--{axis}", draw(UNHEARD) + "?"], {}, f"--{axis}"
    kind_of = {flag: kinds(field.type) for flag, field in flags.items()}
    if what == "extra":
        flag = draw(
            st.sampled_from(
                [f for f, k in kind_of.items() if k & {int, float} and "betas" not in f and "group-sizes" not in f]
            )
        )
        return [*args, flag, "1", "more"], {}, flag
    if what == "choice":
        flag = draw(st.sampled_from([f for f, kind in kind_of.items() if typing.Literal in kind]))
        return [*args, flag, draw(st.sampled_from(["", "no", "nan", "0"])) + "?"], {}, flag
    if what == "text":
        flag = draw(st.sampled_from([f for f, kind in kind_of.items() if kind == {str} and "instruction" not in f]))
        value = draw(st.sampled_from(["\x1b]0;title\x07", "a\rb", "x" * 5000, "\x9b31m", "a" * 300 + "/b"]))
        return [*args, flag, value], {}, flag
    flag = draw(st.sampled_from([f for f, kind in kind_of.items() if kind & {int, float}]))
    kind = int if int in kind_of[flag] else float
    if what == "number":
        value = draw(st.sampled_from(bad_numbers(flags[flag], kind)))
        times = 2 if flag.endswith("betas") else 1
        return [*args, flag, *[value] * times], {}, flag
    value = draw(st.sampled_from(["1e-6", "7", True, {"a": 1}, [[1]], "", math.nan, ["x", 2]]))
    return args, {flag: value}, flag


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "nan" if value != value else json.dumps(value)


def recipe_text(axes: list[str], recipe: dict) -> str:
    """The embedded recipe with one key changed, and the members of the axes it belongs to."""
    (flag, value), lines = next(iter(recipe.items())), EMBEDDED_RECIPE.read_text()
    *sections, key = flag.removeprefix("--").replace("-", "_").split(".")
    members = dict(zip(axes[::2], axes[1::2], strict=True))
    table = {axis.removeprefix("--"): f'type = "{name}"\n' for axis, name in members.items()}
    section = ".".join(sections)
    lines = re.sub(rf"(?m)^{key} = .*\n", "", lines) if key in lines else lines
    if not section:
        return f"{key} = {toml(value)}\n{lines}" + "".join(f"[{name}]\n{line}" for name, line in table.items())
    table[section] = table.get(section, "") + f"{key} = {toml(value)}\n"
    for name, line in table.items():
        lines = (
            lines.replace(f"[{name}]\n", f"[{name}]\n{line}") if f"[{name}]" in lines else f"{lines}\n[{name}]\n{line}"
        )
    return lines


def refusal(args: list[str], recipe: dict, folder) -> ValueError:
    argv = args
    if recipe:
        (folder / "r.toml").write_text(recipe_text(args[:6], recipe))
        argv = [str(folder / "r.toml"), *args[6:]]
    with pytest.raises(ValueError) as caught:
        configure(argv)
    (folder / "r.toml").unlink(missing_ok=True)
    return caught.value


def check(case, folder) -> None:
    args, recipe, key = case
    error = refusal(args, recipe, folder)
    assert exit_code(error) == 2
    word = key.rpartition(".")[2].removeprefix("--")
    said = str(error).replace("_", "-")
    assert word.replace("_", "-") in said, (args[6:], recipe, said)
    assert "\x1b" not in said and len(said) < 1500
    assert list(folder.iterdir()) == []


def fuzz(examples: int, folder, **options) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        **options,  # a case is short, and shrinking it takes longer than reading it
    )
    @given(bad_settings())
    def run(case):
        check(case, folder)

    run()


@pytest.mark.parametrize(
    "value, hint, said",
    [
        ("1e-6", float, "a number, got '1e-6'"),
        (1.5, int, "a whole number, got 1.5"),
        (True, int, "a whole number"),
        (1, bool, "true or false, got 1"),
        (7, str, "text in quotes, got 7"),
        ([1, "x"], tuple[int, ...], "got 'x'"),
        ("--steps", str, "not begin with --"),
        ("x", float | None, "a number"),
        ([1], int, "a whole number, got [1]"),
        (3, typing.Literal["a"], "text in quotes"),
        ({"a": 1}, int, "a whole number"),
    ],
)
def test_a_value_of_a_recipe_has_its_fields_type(value, hint, said):
    with pytest.raises(ValueError, match=f"^r.toml: --x must {'be .*' * (said[0] != 'n')}{re.escape(said)}"):
        check_type("r.toml: --x", value, hint)


def test_values_of_the_right_type_are_taken():
    lists = tuple[int, ...]
    for value, hint in ((1, float), (1e-6, float), ("None", float | None), ([1, 2], lists), (5, lists)):
        check_type("x", value, hint)


def with_sections(classes: list[type]) -> list[type]:
    """Classes of settings, and those that are nested in them."""
    found = list(classes)
    for cls in found:  # grows
        default = cls()
        values = [getattr(default, field.name) for field in dataclasses.fields(cls) if field.init]
        nested = [type(value) for value in values if dataclasses.is_dataclass(value)]
        found += [other for other in dict.fromkeys(nested) if other not in found]
    return found


PROGRAMS = [TrainConfig, EvaluateConfig, ProfileConfig, PlanConfig, CompareConfig, DoctorConfig]
MEMBERS = [member for members in AXES.values() for member in members.values()]
CONFIGS = with_sections(PROGRAMS + MEMBERS)
NUMBERS = [
    (cls, field.name, kind, value)
    for cls in CONFIGS
    for field in dataclasses.fields(cls)
    if field.init
    for kind in [kinds(typing.get_type_hints(cls)[field.name]) & {int, float}]
    for value in (-1, 10**400, *([math.nan, math.inf] if float in kind else []))
    if kind and not allowed(value, field)
]


@pytest.mark.parametrize("cls, name, kind, value", NUMBERS, ids=lambda x: getattr(x, "__name__", str(x)[:12]))
@pytest.mark.promise("D8", trials=0)
def test_every_number_of_every_program_has_bounds(cls, name, kind, value):
    default = getattr(cls(), name)
    several = isinstance(default, tuple)
    with pytest.raises(ValueError) as caught:
        cls(**{name: (value,) * len(default) if several else value})
    assert name.replace("_", "-") in str(caught.value).replace("_", "-")


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_setting_is_declared_whole(cls):
    """A number has bounds, and each setting a help text of its own: tyro gives it that of the line above otherwise."""
    for field in dataclasses.fields(cls):
        if field.init and field.default_factory is dataclasses.MISSING:
            number = kinds(typing.get_type_hints(cls)[field.name]) & {int, float}
            assert not number or field.metadata.get("bounds"), f"{cls.__name__}.{field.name} has no bounds"
            owner = next(c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", {}))
            declared = re.search(rf"(    # .+\n)?    {field.name}: .+", inspect.getsource(owner))
            assert "  # " in declared[0], f"{owner.__name__}.{field.name} has no help text"


STATE = [
    (axis, member, field.name)
    for axis, members in AXES.items()
    for member, cls in members.items()
    for field in dataclasses.fields(cls)
    if not field.init
]


@pytest.mark.parametrize("axis, member, name", [*STATE, ("update", "gxpo", "watch.seen")])
def test_state_is_no_setting(axis, member, name, tmp_path):
    flag = f"--{axis}.{name}".replace("_", "-")
    with pytest.raises(ValueError, match=f"^the command line: there is no option {flag}(;|$)"):
        configure([f"--{axis}", member, flag, "1"])
    recipe, (section, _, key) = tmp_path / "r.toml", f"{axis}.{name}".rpartition(".")
    recipe.write_text(f'[{axis}]\ntype = "{member}"\n{f"[{section}]" * (section != axis)}\n{key} = 1\n')
    with pytest.raises(ValueError, match=f"there is no key '{axis}.{name.partition('.')[0]}'"):
        configure([str(recipe)])


@pytest.mark.parametrize("axis, member", [("update", "gxpo"), ("allocation", "sgpo")])
def test_help_lists_settings_and_no_state(axis, member, capsys):
    with pytest.raises(SystemExit):
        configure([f"--{axis}", member, "--help"])
    listed = set(re.findall(rf"--{axis}\.([a-z.-]+)", capsys.readouterr().out))
    assert listed >= {f.name.replace("_", "-") for f in dataclasses.fields(AXES[axis][member]) if f.init}
    assert not {word.partition(".")[0] for word in listed} & {
        name.replace("_", "-") for at, _, name in STATE if at == axis
    }


@pytest.mark.promise("D8", trials=12)
def test_bad_configurations_are_refused_with_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz(12, tmp_path, derandomize=True)


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.promise("D8", trials=988)
def test_many_bad_configurations_are_refused_with_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz(988, tmp_path)
