"""Which of the known names somebody may have meant."""

import difflib
from collections.abc import Iterable

CLOSE = 0.75  # of difflib: one letter of four; what is further away is another word, and misleads


def nearest(name: str, known: Iterable[str], cutoff: float = CLOSE) -> str:
    """The known name that is closest, or has the same letters; empty where none is close."""
    names = list(known)
    same = [other for other in names if sorted(other) == sorted(name)]
    return next(iter(same or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "; see --help") -> str:
    """What an error message ends with: '; did you mean X?' where a known name is close."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else otherwise
