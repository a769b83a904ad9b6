"""Whether the JSON of a checkpoint has the form of what this program writes: names, types and bounds of every value."""

from typing import TypeGuard

from fastrl.base.types import CheckpointError

MOST = 2**53  # beyond it JSON's numbers are not exact in every reader
MAX_ITEMS = 10**6


def whole(value: object, least: int = 0, most: int = MOST) -> TypeGuard[int]:
    """An integer in bounds, and no bool."""
    return type(value) is int and least <= value <= most


def check_form(value: object, own: object, where: str) -> None:
    """Raise CheckpointError unless `value` is what a run could have written where this run writes `own`.

    A dict must have every name of `own`, and what else it has is plain: numbers, texts, lists of them. An int is not
    negative, and what is None here may be a number there, and the other way round.
    """
    if isinstance(own, dict):
        if not isinstance(value, dict):
            raise unfit(where, value, "an object")
        missing = [name for name in own if name not in value]
        if missing:
            raise CheckpointError(f"{where}: the checkpoint has no {', '.join(missing)}; use one that is complete")
        for name in own:
            if name != "config":  # compared as a whole, setting by setting
                check_form(value[name], own[name], f"{where}: {name}")
        for name in value.keys() - own.keys():
            if not plain(value[name]):
                raise unfit(f"{where}: {name[:80]!r}", value[name], "a number, a text or a list of them")
    elif isinstance(own, (list, tuple)):
        if not isinstance(value, list) or not plain(value):
            raise unfit(where, value, "a list of numbers or texts")
    elif isinstance(own, str) != isinstance(value, str) or not scalar(value):
        raise unfit(where, value, "a text" if isinstance(own, str) else "a number")
    elif isinstance(own, bool) and not isinstance(value, bool):
        raise unfit(where, value, "true or false")
    elif type(own) is int and value is not None and not whole(value):
        raise unfit(where, value, f"an integer from 0 to {MOST}")


def scalar(value: object) -> bool:
    """A number of moderate size, a text, a truth value or nothing."""
    return value is None or isinstance(value, (bool, float, str)) or whole(value, -MOST)


def plain(value: object, depth: int = 2) -> bool:
    """A scalar, or a list of such values, `depth` lists deep at most."""
    if not isinstance(value, list):
        return scalar(value)
    return depth > 0 and len(value) <= MAX_ITEMS and all(plain(item, depth - 1) for item in value)


def unfit(where: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{where} is {repr(value)[:80]}, expected {expected}; use another checkpoint")
