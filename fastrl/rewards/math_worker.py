"""The process that runs math-verify on text a model wrote. Started as a script by `workers`; never imported by it.

Protocol, one JSON value per line: limits in argv; "ready" out; then [gold, answer] in and a status out, until stdin
ends. Nothing of fastrl and no torch is imported, so a worker starts in the time of importing sympy.
"""

import functools
import importlib.util
import json
import logging
import mmap
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

RESERVE = 16 * 2**20  # bytes that must be left after an answer that is not right; Python's own blocks are 1 MiB at most


def equality():
    """The file beside this one, which replaces math-verify's comparison; by its path, as a script has no package."""
    spec = importlib.util.spec_from_file_location("equality", Path(__file__).with_name("equality.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SoftTimeout(BaseException):
    """A BaseException, so that no `except Exception` of sympy swallows it."""


def raise_soft_timeout(signum, frame):
    raise SoftTimeout


def limited(function, *args, cpu_s: float, kill_cpu_s: float):
    """function(*args), interrupted by SoftTimeout after cpu_s seconds of CPU time.

    CPU and not wall time: a busy machine must not change a grade. One long call into C code is not interrupted by a
    Python signal handler; for that a second timer runs, whose signal has no handler and ends the process.
    """
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, kill_cpu_s)
        # repeated, in case a bare `except:` swallows the first one
        signal.setitimer(signal.ITIMER_PROF, cpu_s, 0.1)
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def parse(text: str):
    """The sympy expression of an answer, or None if it cannot be read.

    math-verify drops units, and with them single letters: `\\sin^2 t` and `a + b + c` lose their end. So units are
    dropped only where nothing can be read otherwise.
    """
    for units in (False, True):
        expression = parse_latex("\\boxed{" + text + "}", units)
        if expression is not None:
            return expression
    return None


def parse_latex(text: str, units: bool):
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0)
    config = replace(config, normalization_config=replace(config.normalization_config, units=units))
    # LaTeX only: the plain-expression reader ends in eval. First match only: if the box cannot be read, any_match
    # goes on to a single fraction inside it, and `\frac{2}{3} E_2` becomes 2/3. No fallback: the normalized text of two
    # answers that cannot be read is equal too often.
    found = parse(
        text,
        [config],
        "no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType] its int may be None, for no limit
        raise_on_error=True,
    )
    return found[0] if found else None


NO_LIMIT = {"timeout_seconds": None, "raise_on_error": True}
parse_gold = functools.lru_cache(maxsize=2048)(parse)


def compare(gold, text: str) -> str:
    """Status of an answer against a parsed gold."""
    from math_verify import verify

    answer = parse(text)
    if gold is None or answer is None or not (finite(gold) and finite(answer)):
        return "unparsed"
    right = verify(with_unit_i(gold), with_unit_i(answer), allow_set_relation_comp=True, **NO_LIMIT)
    return "right" if right else "wrong"


def finite(expression) -> bool:
    r"""Whether it has a value: `\frac{1}{0}` has none, and is equal to nothing."""
    from sympy import Basic, nan, zoo

    return not (isinstance(expression, Basic) and expression.has(zoo, nan))


def with_unit_i(expression):
    r"""`i` alone is read as a variable; as a factor of 1 it is compared by value: i and e^{i\pi/2}."""
    from sympy import Mul, Symbol

    is_unit = isinstance(expression, Symbol) and expression.name == "i"
    return Mul(1, expression, evaluate=False) if is_unit else expression


def grade(gold: str, answer: str, limits: dict[str, float]) -> str:
    """Status of an answer. The gold has a time limit of its own: whether it was cached must not change a grade."""
    try:
        parsed_gold = limited(parse_gold, gold, **limits)
        status = limited(compare, parsed_gold, answer, **limits)
    except SoftTimeout:
        # a repeat may have arrived inside `finally`, before the timers were off
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return "soft_timeout"
    except MemoryError:
        # earlier answers may have filled the memory: a fresh process is asked
        os._exit(1)
    except Exception:  # whatever the parser or sympy raises on text that a model wrote: the status says it
        status = "unparsed"
    if status != "right":
        leave_if_full()
    return status


def leave_if_full() -> None:
    """End the process where memory is short: sympy swallows MemoryError, and a right answer would look unreadable.

    A gold that could not be read for want of memory is in the cache, too; a fresh process is asked.
    """
    try:
        mmap.mmap(-1, RESERVE).close()
    except OSError:
        os._exit(1)


def address_space() -> int:
    """Bytes."""
    with open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[0]) * resource.getpagesize()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes stdin
    memory_mib, cpu_s, kill_cpu_s = json.loads(sys.argv[1])
    equality().install()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, raise_soft_timeout)
    memory = memory_mib * 2**20
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    limits = {"cpu_s": cpu_s, "kill_cpu_s": kill_cpu_s}
    replies = os.dup(1)
    # whatever sympy prints must not become a reply
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.write(replies, b'"ready"\n')
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        os.write(replies, json.dumps(grade(gold, answer, limits)).encode() + b"\n")
        # sympy's caches keep what they have seen, and the next answer must find as much memory as the first
        if address_space() > memory // 2:
            break


if __name__ == "__main__":
    main()
