"""How a program ends: one line on stderr and an exit code for what a user can mend, a traceback for a bug.

Whatever goes to the terminal may quote a completion, a row or a file name, so control characters in it are escaped.
"""

import sys
import traceback
from collections.abc import Callable

from fastrl.base.log import printable


def exit_code(error: BaseException) -> int:
    """0 done, 2 configuration, 3 data, 4 numerics, 5 engine or worker lost, 6 checkpoint; 1 for anything unforeseen."""
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)


def fail(error: BaseException) -> int:
    """Print an error that is meant for the user as one line; its exit code."""
    print(f"fastrl: error: {printable(str(error))}", file=sys.stderr, flush=True)
    return exit_code(error)


def run_program(main: Callable[[list[str]], int]) -> None:
    """Run main(argv) and leave with its exit code; set-up errors are one line, bugs keep their traceback."""
    try:
        code = main(sys.argv[1:])
    except ValueError as error:
        code = fail(error)
    except Exception as error:
        print(printable(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        code = exit_code(error)
    sys.exit(code)
