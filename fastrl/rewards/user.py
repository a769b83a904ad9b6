"""A reward function from a user's file, written for TRL or for verl.

    TRL    f(prompts, completions, **columns) -> list[float | None], or (that list, {metric: value})
    verl   compute_score(data_source, solution_str, ground_truth, extra_info) -> float, or {"score": float, ...}

Either may be async. It runs in the trainer's process, in its main thread, and is trusted like the trainer; but it gets
copies of everything, a call has a time limit, and whatever it returns or raises is a reward or an error that names it.
"""

import asyncio
import importlib.util
import inspect
import logging
import math
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.base.log import printable
from fastrl.base.names import nearest
from fastrl.rewards.process import copied, exit_refused, process_kept
from fastrl.rewards.time_limit import TimeUp, call_within, in_thread
from fastrl.rewards.values import is_real, pass_on, said, short

logger = logging.getLogger(__name__)

TIMEOUT_S = 600.0  # wall time of a call, unless somebody says otherwise
MOST = 1e18  # size of a reward: float32, in which advantages are computed, must hold squares and their sums


@dataclass(slots=True)
class UserScores:
    rewards: list[float | None]  # per completion; None = not applicable
    errors: list[int] = field(default_factory=list)  # completions on which the function raised; their reward here is 0
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # completions that a metric is a mean over


def load_function(path: str, function: str) -> Callable:
    """The function of a Python file. Raises ValueError if the file or the function is missing or the file fails."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"reward {path}:{function}: no file {file.resolve()}; give the path of an existing .py file")
    module = load_module(file, f"reward {path}:{function}")
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        near = nearest(function, names)
        hint = f"did you mean {near!r}?" if near else f"its functions are: {', '.join(names) or 'none'}"
        raise ValueError(f"reward {path}:{function}: the file has no function {function!r}; {hint}")
    return found


def load_module(file: Path, where: str) -> ModuleType:
    name = f"fastrl_user_reward_{file.stem}_{abs(hash(file.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{where}: {file} is no Python file; give the path of an existing .py file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look their module up by name
    sys.modules[name] = module
    try:
        with exit_refused():
            spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit too: a file must not end the run without its name
        del sys.modules[name]
        pass_on(error)
        raise ValueError(f"{where}: importing the file raised {said(error)}") from error
    return module


class UserReward:
    """Calls a user's function and checks what it returns."""

    def __init__(self, name: str, function: Callable, timeout_s: float = TIMEOUT_S):
        """timeout_s: wall time of a call; 0 = no limit. Raises ValueError if the function takes no completions."""
        self.name = name
        self.function = function
        self.timeout_s = timeout_s
        try:
            parameters = inspect.signature(function).parameters
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"reward {name}: its parameters are unknown ({error}); write a function that calls it"
            ) from error
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.required = {name for name in self.accepted if parameters[name].default is inspect.Parameter.empty}
        self.per_completion = {"solution_str", "ground_truth"} <= self.accepted
        if not (self.per_completion or self.takes_all or "completions" in self.accepted):
            raise ValueError(
                f"reward {name}: it takes ({', '.join(parameters)}); expected f(prompts, completions, **columns) "
                "or compute_score(data_source, solution_str, ground_truth, extra_info)"
            )
        self.error_shown = False

    def score(self, offered: dict[str, list]) -> UserScores:
        """Lists of equal length by name (prompts, completions, answers and every column) -> one reward per completion.

        Raises ValueError if every call fails, if one takes too long, or if what is returned is no list of finite
        floats or None.
        """
        if not offered["completions"]:
            return UserScores([])
        if self.per_completion:
            return self.call_each(offered)
        self.require_parameters(offered)
        try:
            return self.call_batch(offered)
        except FunctionError as error:
            cause = error.cause
        if len(offered["completions"]) == 1:
            raise self.every_call_failed(1, cause) from cause
        scores = self.call_each(offered)
        if not scores.errors:
            self.show_once(cause, "on the whole batch, but on no completion alone; nothing is lost")
        return scores

    def call_each(self, offered: dict[str, list]) -> UserScores:
        """One call per completion, so that a completion that makes the function raise costs only its own reward."""
        scores = UserScores([])
        count = len(offered["completions"])
        found: dict[str, list[float]] = {}
        for i in range(count):
            row = {name: values[i : i + 1] for name, values in offered.items()}
            try:
                one = self.call_one(row) if self.per_completion else self.call_batch(row)
            except FunctionError as error:
                self.show_once(error.cause, f"and this completion earns nothing: {short(row['completions'][0])}")
                scores.rewards.append(0.0)
                scores.errors.append(i)
                if len(scores.errors) == count:
                    raise self.every_call_failed(count, error.cause) from error.cause
                continue
            scores.rewards += one.rewards
            for name, value in one.metrics.items():
                found.setdefault(name, []).append(value)
        scores.metrics = {name: sum(values) / len(values) for name, values in found.items()}
        scores.counts = {name: len(values) for name, values in found.items()}
        return scores

    def call_batch(self, offered: dict[str, list]) -> UserScores:
        count = len(offered["completions"])

        def read(result: Any) -> UserScores:
            pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], list | tuple | dict)
            pair = pair or isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
            rewards, metrics = result if pair else (result, {})
            return self.scores(self.checked_rewards(rewards, count), metrics)

        return self.call(offered if self.takes_all else {k: v for k, v in offered.items() if k in self.accepted}, read)

    def call_one(self, row: dict[str, list]) -> UserScores:
        columns = {name: values[0] for name, values in row.items()}
        arguments = {
            "data_source": columns.get("data_source", columns.get("source", "")),
            "solution_str": columns["completions"],
            "ground_truth": columns["answers"],
            "extra_info": columns.get("extra_info", columns),
        }

        def read(result: Any) -> UserScores:
            metrics = {}
            if isinstance(result, dict):
                if "score" not in result:
                    raise ValueError(
                        f"reward {self.name}: returned a dict with {short(list(result))}; expected the key 'score'"
                    )
                metrics = {k: v for k, v in result.items() if k != "score" and isinstance(v, int | float)}
                result = result["score"]
            return self.scores(self.checked_rewards([result], 1), metrics)

        return self.call({k: v for k, v in arguments.items() if self.takes_all or k in self.accepted}, read)

    def call(self, arguments: dict, read: Callable[[Any], UserScores]) -> UserScores:
        """What `read` makes of the function's value, both within the time limit.

        Raises FunctionError when the function raises, whatever that is: exit() must not end the training, nor a
        KeyboardInterrupt that no Ctrl-C has made.
        """

        def run() -> UserScores:
            try:
                result = self.function(**copied(arguments))
                result = wait_for(result) if inspect.isawaitable(result) else result
            except BaseException as error:  # CancelledError and SystemExit too: none may pass for the run's own
                pass_on(error)
                raise FunctionError(error) from error
            return read(result)

        try:
            with process_kept():
                return call_within(self.timeout_s, run)
        except TimeUp as late:
            logger.warning("reward %s stood here when its time was up\n%s", self.name, printable("".join(late.stack)))
            raise self.too_slow(late) from None

    def too_slow(self, late: TimeUp) -> ValueError:
        file = getattr(getattr(inspect.unwrap(self.function), "__code__", None), "co_filename", "")
        own = [frame for frame in late.stack if file and f'"{file}"' in frame]
        where = " ".join((own or late.stack)[-1].split())
        return ValueError(
            f"reward {self.name}: a call took longer than --reward-timeout {self.timeout_s:g} s and was interrupted in "
            f"{where}; make it faster, or raise the limit (0 = none)"
        )

    def require_parameters(self, offered: dict[str, list]) -> None:
        if missing := self.required - offered.keys():
            raise ValueError(
                f"reward {self.name}: its parameter {', '.join(sorted(missing))} is neither a column of the data "
                f"nor offered; there are: {', '.join(sorted(offered))}"
            )

    def scores(self, rewards: list[float | None], metrics: object) -> UserScores:
        """Of one call, whose metrics are about all of its completions."""
        checked = self.checked_metrics(metrics)
        return UserScores(rewards, [], checked, dict.fromkeys(checked, len(rewards)))

    def checked_rewards(self, rewards: Any, count: int) -> list[float | None]:
        try:
            if hasattr(rewards, "tolist"):  # numpy and torch
                rewards = rewards.tolist()
            values = list(rewards) if isinstance(rewards, list | tuple) else None
        except BaseException as error:  # methods of a value of the user's may raise anything
            pass_on(error)
            raise self.unreadable(f"returned {short(rewards)}", error) from error
        if values is None:
            raise ValueError(
                f"reward {self.name}: returned {short(rewards)}; expected a list, one float per completion"
            )
        if len(values) != count:
            raise ValueError(f"reward {self.name}: got {len(values)} rewards; expected {count}, one per completion")
        return [self.checked(reward, f"reward number {i}") for i, reward in enumerate(values)]

    def checked(self, value: Any, what: str) -> float | None:
        if value is None:
            return None
        try:
            number = float(value) if is_real(value) else math.nan
        except BaseException as error:  # as above: __float__
            pass_on(error)
            raise self.unreadable(f"{what} is {short(value)}", error) from error
        if not math.isfinite(number):
            raise ValueError(f"reward {self.name}: {what} is {short(value)}; expected a finite float or None")
        if abs(number) > MOST:
            raise ValueError(
                f"reward {self.name}: {what} is {short(value)}; expected a float from {-MOST:g} to {MOST:g}, or None"
            )
        return number

    def unreadable(self, what: str, error: BaseException) -> ValueError:
        return ValueError(
            f"reward {self.name}: {what}, which is no number: {said(error)}; expected a finite float or None"
        )

    def checked_metrics(self, metrics: object) -> dict[str, float]:
        if not isinstance(metrics, dict):
            raise ValueError(f"reward {self.name}: metrics are {short(metrics)}; expected a dict of floats")
        names = {key: key if isinstance(key, str) else short(key) for key in metrics}
        found = {
            f"{self.name}/{names[key]}": self.checked(value, f"metric {names[key]}") for key, value in metrics.items()
        }
        return {name: value for name, value in found.items() if value is not None}

    def show_once(self, error: BaseException, what: str) -> None:
        if not self.error_shown:
            self.error_shown = True
            text = "".join(traceback.format_exception(error))
            logger.warning("reward %s raised %s\n%s", self.name, what, printable(text))

    def every_call_failed(self, count: int, error: BaseException) -> ValueError:
        return ValueError(
            f"reward {self.name}: raised {said(error)} on every one of {count} completions; "
            "fix the function or the columns that it reads"
        )


class FunctionError(Exception):
    """The user's function raised."""

    def __init__(self, cause: BaseException):
        super().__init__()
        self.cause = cause


def wait_for(awaitable: Awaitable):
    async def wait():
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # a loop runs in this thread (a notebook): it cannot be entered twice
    return in_thread(lambda: asyncio.run(wait()))
