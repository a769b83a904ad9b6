"""How many cases of a test there are, and which of them only `make soak` runs."""

import pytest
from hypothesis import HealthCheck, given, settings


def mostly_later(values, *now):
    """Parameters of a test, of which those that are not in `now` only run in `make soak`."""
    return [value if value in now else pytest.param(*listed(value), marks=pytest.mark.soak) for value in values]


def listed(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def examples(check, count: int, **strategies) -> None:
    """Call `check` with `count` examples of hypothesis' strategies, the same ones in every run."""
    quiet = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    settings(max_examples=count, **quiet)(given(**strategies)(check))()
