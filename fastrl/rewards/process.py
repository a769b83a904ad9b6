"""What a user's function must not leave behind in the trainer's process, and what it gets instead of its objects."""

import copy
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
ATOMS = {int, float, bool, str, bytes, type(None)}  # nobody can change these


def copied(value: Any) -> Any:
    """A deep copy; lists of numbers and texts, which are most of it, are copied at once."""
    if type(value) is list:
        return value.copy() if set(map(type, value)) <= ATOMS else [copied(item) for item in value]
    if type(value) is dict:
        return {copied(name): copied(item) for name, item in value.items()}
    return value if type(value) in ATOMS else copy.deepcopy(value)


@contextmanager
def process_kept() -> Iterator[None]:
    """Come back in the process that went in, with its current folder, streams, filters of warnings, handlers of signals
    and torch's modes, and with no alarm that is still to ring.

    A run's paths may be relative, and SIGTERM must save it. A child that a function has forked would otherwise go on as
    a second trainer; it ends here. Of torch: the default dtype, the gradient mode and the number of threads, which
    decide what a step computes.
    """
    process, folder = os.getpid(), os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    streams = sys.stdout, sys.stderr
    modes = torch_modes()
    try:
        with warnings.catch_warnings(), signals_kept(), exit_refused():
            yield
    finally:
        if os.getpid() != process:
            os._exit(1)
        os.fchdir(folder)
        os.close(folder)
        sys.stdout, sys.stderr = streams
        if modes is not None and torch_modes() != modes:
            set_torch_modes(*modes)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Handlers and the alarm as they were. Other threads than the main one can change no handler."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    (left, interval), begun = signal.getitimer(signal.ITIMER_REAL), time.monotonic()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            rest = max(1e-3, left - (time.monotonic() - begun)) if left else 0.0
            signal.setitimer(signal.ITIMER_REAL, rest, interval)
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


@contextmanager
def exit_refused() -> Iterator[None]:
    """os._exit in this thread raises SystemExit: it would end a run with whatever code it is given, such as 0.

    Other threads (the watchdog's) and forked children leave as usual, and so does a function that has imported the
    name: of that status.json alone knows, which still says that the run is running.
    """
    process, thread, leave, inside = os.getpid(), threading.get_ident(), os._exit, True

    def refuse(status: int) -> NoReturn:
        if inside and (os.getpid(), threading.get_ident()) == (process, thread):
            raise SystemExit(f"os._exit({status!r})")
        leave(status)

    os.__dict__["_exit"] = refuse
    try:
        yield
    finally:
        inside = False
        os.__dict__["_exit"] = leave


def torch_modes() -> tuple | None:
    """None where nobody has imported torch."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return None
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()


def set_torch_modes(dtype: Any, grad: bool, threads: int) -> None:
    import torch

    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)
