"""A setting is one line of a dataclass: its default, the numbers it may be, and its help text as a comment.

    steps: int = setting(200, "[1, 1e9]", free=True, known_as="max_steps")  # optimizer steps of the run

A field with init=False is state and no setting. Where settings are many, sections hold them.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def setting(
    default: Any, bounds: str = "", *, hint: str = "", free: bool = False, known_as: str | tuple[str, ...] = ()
) -> Any:
    """A field of a dataclass.

    bounds: the interval of a number, as in "(0, 1]"; every number has one. hint: what to do where it lies outside.
    free: whether a run that goes on from a checkpoint may have another value. known_as: names in other trainers.
    """
    assert not bounds or INTERVAL.fullmatch(bounds), bounds
    names = (known_as,) if isinstance(known_as, str) else known_as
    return dataclasses.field(
        default=default, metadata={"bounds": bounds, "hint": hint, "free": free, "known_as": names}
    )


@dataclasses.dataclass(kw_only=True)
class Section:
    """A dataclass of settings that is a part of another, whose flags are typed without its name."""

    def __post_init__(self):
        check_bounds(self)


def has_settings(value: object) -> "TypeGuard[DataclassInstance]":
    """Whether the value of a field is a dataclass of further settings."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def settings_of(config: "DataclassInstance", prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, object]]:
    """(path, field, value) of every setting: optim.lr for one of a nested dataclass, steps for one of a section."""
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        if isinstance(value, Section):
            yield from settings_of(value, prefix)
        elif has_settings(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def free_settings(config: "DataclassInstance") -> set[str]:
    """Paths of the settings that may change between a run and its continuation."""
    return {path for path, field, _ in settings_of(config) if field.metadata.get("free")}


def flag_of(path: str) -> str:
    """optim.max_grad_norm -> --optim.max-grad-norm"""
    return f"--{path}".replace("_", "-")


def check_bounds(config: "DataclassInstance", section: str = "", /) -> None:
    """Raise a ValueError that names the flag when a number of a dataclass lies outside its bounds.

    section: what its flags begin with, as in "optim.". NaN lies outside every interval. None is not looked at; of a
    tuple every element is.
    """
    for field in dataclasses.fields(config):
        bounds, value = field.metadata.get("bounds", ""), getattr(config, field.name, None)
        for number in (value if isinstance(value, tuple) else (value,)) if bounds else ():
            missed = outside(number, bounds, whole=bool(field.metadata["hint"]))
            if missed:
                more = f"; {field.metadata['hint']}" if field.metadata["hint"] else ""
                raise ValueError(f"{flag_of(section + field.name)} must be {missed}, got {value}{more}")


def outside(number: float | None, bounds: str, whole: bool = False) -> str:
    """What a number had to be, such as "at least 1"; empty where it is. whole: both ends, as for NaN."""
    found = INTERVAL.fullmatch(bounds)
    assert found is not None, bounds
    opening, low, high, closing = found.groups()
    least = f"{'at least' if opening == '[' else 'above'} {low}"
    most = f"{'at most' if closing == ']' else 'below'} {high}"
    if number is None:
        return ""
    too_low = number < float(low) or number == float(low) and opening == "("
    too_high = number > float(high) or number == float(high) and closing == ")"
    if number == number and not (too_low or too_high):
        return ""
    if number == number and not whole:
        return least if too_low else most
    return f"between {low} and {high}" if opening + closing == "()" else f"{least} and {most}"
