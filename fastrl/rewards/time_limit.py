"""A limit on the wall time of a call that runs in the trainer's process."""

import asyncio
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import CoroutineType, FrameType
from typing import TypeVar

T = TypeVar("T")

SIGNAL = signal.SIGPROF  # SIGALRM is left to the functions: math-verify, for one, sets alarms of its own
AGAIN_S = 1.0  # from one interruption to the next
GRACE_S = 30.0  # that a call has to end after the first one


class TimeUp(BaseException):
    """The time is up. Derived from BaseException, so that an `except Exception` of the function lets it through."""

    def __init__(self, stack: list[str]):
        """stack: where the call stood, as `traceback.format_stack` writes it, innermost last."""
        super().__init__("the time is up")
        self.stack = stack


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """call(), which raises TimeUp when it takes longer than `seconds` of wall time; 0 = no limit.

    In the main thread a signal interrupts it wherever Python looks at signals: between two bytecodes, in sleep, in
    waits for locks, files and sockets, in regular expressions. A thread sends it to a call that waits; the kernel's
    timer of CPU time to one that keeps Python's lock, under which that thread could not run. It comes again every
    second, for a `finally` or a bare `except` of the call may use the first one up. What is not interrupted even so,
    such as C code that never looks, ends the process GRACE_S later: exit code 1, and all stacks on stderr.

    No other thread sees signals. There the call runs in a daemon thread, which is left behind when the time is up: it
    goes on until the process ends, and nobody waits for it.
    """
    if not seconds:
        return call()
    if threading.current_thread() is not threading.main_thread():
        return in_thread(call, seconds)
    begun, over, inside, process = time.monotonic(), threading.Event(), True, os.getpid()
    main = threading.main_thread().ident
    assert main is not None  # it runs

    def interrupt(number: int, frame: FrameType | None) -> None:
        if inside and time.monotonic() - begun >= seconds:
            raise TimeUp([*traceback.format_stack(frame), *waiting_tasks()])

    def ring() -> None:
        wait = seconds
        while not over.wait(wait):
            wait = AGAIN_S
            signal.pthread_kill(main, SIGNAL)

    before = signal.signal(SIGNAL, interrupt)
    bell = threading.Thread(target=ring, daemon=True)
    bell.start()
    signal.setitimer(signal.ITIMER_PROF, AGAIN_S, AGAIN_S)
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=2)
    try:
        try:
            return call()
        finally:
            inside = False
    finally:  # a signal may have come in the line above
        inside = False
        if os.getpid() == process:  # a forked child has no such thread, and may have got its locks locked
            over.set()
            bell.join()
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            # one that is still on its way to another thread would end the process
            signal.signal(SIGNAL, signal.SIG_IGN if before is signal.SIG_DFL else before)


def waiting_tasks() -> list[str]:
    """Where the coroutines of this thread's event loop wait, those that are awaited after those that await them."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:  # no loop runs
        return []
    lines = []
    for task in tasks:
        awaited = task.get_coro()
        while isinstance(awaited, CoroutineType) and awaited.cr_frame:
            lines += traceback.format_stack(awaited.cr_frame, limit=1)
            awaited = awaited.cr_await
    return lines


def in_thread(call: Callable[[], T], seconds: float | None = None) -> T:
    """call() in a daemon thread of its own; its value, or what it has raised. Raises TimeUp after `seconds`."""
    values: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(call())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        assert thread.ident is not None  # it has started
        raise TimeUp(traceback.format_stack(sys._current_frames().get(thread.ident)))
    if errors:
        raise errors[0]
    return values[0]
