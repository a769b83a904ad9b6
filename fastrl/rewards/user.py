"""A reward function from a user's file, written for TRL or for verl.

    TRL    f(prompts, completions, **columns) -> list[float | None], or (that list, {metric: value})
    verl   compute_score(data_source, solution_str, ground_truth, extra_info) -> float, or {"score": float, ...}

Either may be async. It runs in the trainer's process and is trusted like the trainer. A completion on which it raises
earns 0 and is counted.
"""

import asyncio
import importlib.util
import inspect
import logging
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.base.log import printable
from fastrl.base.names import nearest

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 300  # of a completion in a message


@dataclass(slots=True)
class UserScores:
    rewards: list[float | None]  # per completion; None = not applicable
    errors: int = 0  # completions on which the function raised; their reward is 0
    metrics: dict[str, float] = field(default_factory=dict)


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
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{where}: importing the file raised {type(error).__name__}: {error}") from error
    return module


class UserReward:
    """Calls a user's function and checks what it returns."""

    def __init__(self, name: str, function: Callable):
        """Raises ValueError if the function takes no completions by name."""
        self.name = name
        self.function = function
        parameters = inspect.signature(function).parameters
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

        Raises ValueError if every call fails, or if what is returned is no list of finite floats or None.
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
        sums: dict[str, list[float]] = {}
        for i in range(count):
            row = {name: values[i : i + 1] for name, values in offered.items()}
            try:
                one = self.call_one(row) if self.per_completion else self.call_batch(row)
            except FunctionError as error:
                self.show_once(error.cause, f"and this completion earns 0: {short(row['completions'][0])}")
                scores.rewards.append(0.0)
                scores.errors += 1
                if scores.errors == count:
                    raise self.every_call_failed(count, error.cause) from error.cause
                continue
            scores.rewards += one.rewards
            for name, value in one.metrics.items():
                sums.setdefault(name, []).append(value)
        scores.metrics = {name: sum(values) / len(values) for name, values in sums.items()}
        return scores

    def call_batch(self, offered: dict[str, list]) -> UserScores:
        result = self.call(offered if self.takes_all else {k: v for k, v in offered.items() if k in self.accepted})
        rewards, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        return UserScores(self.checked_rewards(rewards, len(offered["completions"])), 0, self.checked_metrics(metrics))

    def call_one(self, row: dict[str, list]) -> UserScores:
        columns = {name: values[0] for name, values in row.items()}
        arguments = {
            "data_source": columns.get("data_source", columns.get("source", "")),
            "solution_str": columns["completions"],
            "ground_truth": columns["answers"],
            "extra_info": columns.get("extra_info", columns),
        }
        result = self.call({k: v for k, v in arguments.items() if self.takes_all or k in self.accepted})
        metrics = {}
        if isinstance(result, dict):
            if "score" not in result:
                raise ValueError(f"reward {self.name}: returned a dict with {sorted(result)}; expected the key 'score'")
            metrics = {k: v for k, v in result.items() if k != "score" and isinstance(v, int | float)}
            result = result["score"]
        return UserScores(self.checked_rewards([result], 1), 0, self.checked_metrics(metrics))

    def call(self, arguments: dict):
        with process_kept():
            try:
                result = self.function(**arguments)
                return wait_for(result) if inspect.isawaitable(result) else result
            # exit() in a reward function must not end the training either
            except (Exception, SystemExit) as error:
                raise FunctionError(error) from error

    def require_parameters(self, offered: dict[str, list]) -> None:
        if missing := self.required - offered.keys():
            raise ValueError(
                f"reward {self.name}: its parameter {', '.join(sorted(missing))} is neither a column of the data "
                f"nor offered; there are: {', '.join(sorted(offered))}"
            )

    def checked_rewards(self, rewards: Any, count: int) -> list[float | None]:
        if hasattr(rewards, "tolist"):  # numpy and torch
            rewards = rewards.tolist()
        if not isinstance(rewards, list | tuple):
            raise ValueError(
                f"reward {self.name}: returned {short(rewards)}; expected a list, one float per completion"
            )
        if len(rewards) != count:
            raise ValueError(f"reward {self.name}: got {len(rewards)} rewards; expected {count}, one per completion")
        return [self.checked(reward, f"reward number {i}") for i, reward in enumerate(rewards)]

    def checked(self, value: Any, what: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, str) or not hasattr(value, "__float__") or not math.isfinite(value):
            raise ValueError(f"reward {self.name}: {what} is {short(value)}; expected a finite float or None")
        return float(value)

    def checked_metrics(self, metrics: object) -> dict[str, float]:
        if not isinstance(metrics, dict):
            raise ValueError(f"reward {self.name}: metrics are {short(metrics)}; expected a dict of floats")
        found = {f"{self.name}/{name}": self.checked(value, f"metric {name}") for name, value in metrics.items()}
        return {name: value for name, value in found.items() if value is not None}

    def show_once(self, error: BaseException, what: str) -> None:
        if not self.error_shown:
            self.error_shown = True
            text = "".join(traceback.format_exception(error))
            logger.warning("reward %s raised %s\n%s", self.name, what, printable(text))

    def every_call_failed(self, count: int, error: BaseException) -> ValueError:
        return ValueError(
            f"reward {self.name}: raised {type(error).__name__}: {error} on every one of {count} completions; "
            "fix the function or the columns that it reads"
        )


class FunctionError(Exception):
    """The user's function raised."""

    def __init__(self, cause: BaseException):
        super().__init__()
        self.cause = cause


@contextmanager
def process_kept() -> Iterator[None]:
    """Come back in the folder that was the current one, and only in the process that went in.

    A run's paths may be relative. A child that a function has forked would otherwise go on as a second trainer.
    """
    process, folder = os.getpid(), os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield
    finally:
        if os.getpid() != process:
            os._exit(1)
        os.fchdir(folder)
        os.close(folder)


def wait_for(awaitable: Awaitable):
    async def wait():
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # a loop runs in this thread (a notebook): it cannot be entered twice
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()


def short(value: object) -> str:
    """ASCII only: a completion may hold terminal escapes."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
