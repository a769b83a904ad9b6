"""Looking at what a user's function returns or raises: any of its methods may raise, or lie."""

import numbers
import signal
from typing import Any

from fastrl.rewards.time_limit import TimeUp

SHOWN_CHARACTERS = 300  # of a value or an error in a message


def is_real(value: Any) -> bool:
    """Whether `float` gives the value itself: of no text, of no date, and of no complex number, which it cuts."""
    dtype = getattr(value, "dtype", None)
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    is_complex |= getattr(dtype, "is_complex", False) is True  # of torch
    kind = getattr(dtype, "kind", "f")  # of numpy
    return not isinstance(value, str) and hasattr(value, "__float__") and kind in "biufO" and not is_complex


def pass_on(error: BaseException) -> None:
    """Raise an error again that the function is not to blame for: the end of its time, and a person's Ctrl-C.

    `train` has a handler of its own for Ctrl-C, which raises nothing: there a KeyboardInterrupt is the function's.
    """
    ctrl_c = isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if isinstance(error, TimeUp) or ctrl_c:
        raise error


def short(value: object) -> str:
    """ASCII only: a completion may hold terminal escapes. Of a value that cannot be shown, its type."""
    try:
        text = ascii(value)
    except BaseException as error:  # __repr__ of a user's value may raise anything
        pass_on(error)
        text = f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def said(error: BaseException) -> str:
    """Type and text of an error, whose text may raise another one."""
    try:
        text = str(error)
    except BaseException as other:  # so may __str__
        pass_on(other)
        text = "(its text cannot be shown)"
    text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
