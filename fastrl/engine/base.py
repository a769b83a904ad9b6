"""What an engine is: token ids in, sampled token ids with their log-probabilities out. Text is not its business."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. The trainer's distribution is that of `temperature` with top_p 1."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    max_new_tokens: int = setting(16, "[1, 1e7]")

    def __post_init__(self):
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be between 0 and 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        check_bounds(self)


@dataclass(slots=True, kw_only=True)
class Request:
    prompt_ids: list[int]
    seeds: list[int]  # one per completion, in [0, 2^63)


class Engine(Protocol):
    policy_version: int  # weight updates this engine has been told of
    progress: Callable[[], None]  # set from outside; called by `sample` as it gets on, so that none is taken for stuck

    def sample(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """For each request one completion per seed. Equal weights and requests, in equal order, give equal ones."""
        ...

    def generate_phase(self) -> AbstractContextManager[None]:
        """Inside, `sample` may be called; outside, the engine holds no more memory than it must."""
        ...

    def weights_changed(self) -> None:
        """The shared weights have new values: whatever was cached from the old ones must not be used again."""

    def close(self) -> None: ...


def sampling_seed(*parts: object) -> int:
    """(run seed, step, problem id, sample, ...) -> a seed in [0, 2^63); no generator has to be saved to repeat it."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
