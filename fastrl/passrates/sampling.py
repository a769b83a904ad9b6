"""How a profile is made: sampling with the run's own engine, in chunks, and again in the course of a run.

The seeds are hash(seed, "profile", problem id, i) and chunks are cut at fixed places, so an interrupted profile goes on
where it stopped and ends with the same rewards. Cost: N rollouts a problem, no training.
"""

import fcntl
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastrl import checkpoint
from fastrl.allocation.base import Allocation
from fastrl.base import ranks
from fastrl.base.types import CheckpointError, Completion, Problem
from fastrl.passrates.file import Profile, read_profile
from fastrl.passrates.key import ProfileKey, weights_digest
from fastrl.step.metrics import spearman
from fastrl.step.rollout import Rollout

CHUNK = 2048  # completions of a rank between two writes


def sample_profile(
    rollout: Rollout,
    problems: Sequence[Problem],
    key: ProfileKey,
    path: Path,
    *,
    stream: tuple = ("profile",),
    leave: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Sample what the file has not yet, and append it chunk by chunk. Every rank samples its share, rank 0 writes.

    leave() is called before each chunk and may raise; what is finished stays. Raises ValueError for a file with another
    key, or one that another process is writing.
    """
    stored = read_profile(path)
    if not ranks.all_max(float(stored is None or not stored.complete)):
        assert stored is not None
        key.refuse_other(stored.key, path)
        return stored  # which may lie where nobody can write
    with appending(path) as append:
        profile = read_profile(path) or Profile(key=key, num_problems=len(problems))
        key.refuse_other(profile.key, path)
        ranks.barrier()  # all have read before rank 0 writes
        append(profile.num_bytes, [] if profile.num_bytes else [profile.header()])
        N = profile.key.num_completions  # the file may have more of them than are asked for
        at_once = max(1, CHUNK * ranks.size() // N)
        while not profile.complete:
            leave()
            begin, done = time.perf_counter(), len(profile.rows)
            part = problems[done : done + at_once]
            rollout.spans.enter("profile")
            with checkpoint.generators_kept():  # reward functions draw from them: a profile must not change a run
                rows = sample_rows(rollout, part, N, stream)
            tokens = sum(len(p.prompt_ids) * N + sum(row["lengths"]) for p, row in zip(part, rows, strict=True))
            profile.rows += rows
            profile.num_rollouts += len(part) * N
            profile.num_tokens += tokens
            gc.collect()  # which is paused while a run is put together
            profile.seconds += time.perf_counter() - begin
            append(None, [*rows, profile.totals()])
            say(f"profile: {len(profile.rows)} of {len(problems)} problems, {profile.seconds:.0f} s")
    return profile


def sample_rows(rollout: Rollout, problems: Sequence[Problem], N: int, stream: tuple) -> list[dict]:
    """N completions of each problem, over all ranks -> the file's rows, in the order of the problems."""
    own = range(ranks.rank(), len(problems), ranks.size())
    groups = rollout.sample([(problems[i], N) for i in own], rollout.sampling, *stream)
    rollout.score(groups)
    rows = [
        [
            i,
            *(c.reward for c in g.completions),
            *(right(rollout, c) for c in g.completions),
            *(len(c.token_ids) for c in g.completions),
        ]
        for i, g in zip(own, groups, strict=True)
    ]
    table = ranks.gather_rows(torch.tensor(rows, dtype=torch.float64).view(-1, 1 + 3 * N))
    return [
        {
            "id": problems[int(i)].id,
            "rewards": values[:N],
            "right": values[N : 2 * N],
            "lengths": [int(n) for n in values[2 * N :]],
        }
        for i, *values in sorted(table.tolist())
    ]


def right(rollout: Rollout, completion: Completion) -> float:
    """What the first verifier says, whatever its weight; with user functions alone, the total reward within [0, 1]."""
    if rollout.rewards.verifiers:
        return completion.rewards.get(rollout.rewards.verifiers[0].name) or 0.0
    return min(1.0, max(0.0, completion.reward))


@contextmanager
def appending(path: Path) -> Iterator[Callable[[int | None, list[dict]], None]]:
    """Yields append(length to cut the file to first or None, objects to write); only rank 0 writes.

    Raises ValueError while another process is writing the file.
    """
    if ranks.rank() > 0:
        ranks.barrier()
        yield lambda length, objects: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing this profile; start again when it is done") from None
        ranks.barrier()  # nobody reads before the lock

        def append(length: int | None, objects: list[dict]) -> None:
            if length is not None:
                file.truncate(length)
            file.write("".join(json.dumps(value) + "\n" for value in objects).encode())
            file.flush()

        yield append


@dataclass(kw_only=True)
class Profiler:
    """The profile of a run: the one it starts with and, every `every` steps, one of the policy as it is then.

    A new one is a file of the run folder. A run that goes on from a checkpoint reads the file its state names, or makes
    the next one again from the same weights with the same seeds; so it is as if it had never been cut.
    """

    rollout: Rollout
    problems: list[Problem]
    allocation: Allocation
    key: ProfileKey
    path: Path  # of the first profile
    folder: Path  # of the run
    every: int  # steps; 0 = never
    weights: Callable[[], torch.Tensor]  # the policy's, flat
    say: Callable[[str], None]

    profile: Profile = field(init=False)
    digest: str = field(init=False)  # of its rows
    file: str = field(default="", init=False)  # in the run folder; empty: the first profile is in force

    def begin(self, leave: Callable[[], None]) -> None:
        """Take the profile from its file, after sampling what is missing there."""
        stored = read_profile(self.path)
        if stored is None or not stored.complete:
            self.say(f"profile: sampling {self.key.num_completions} completions a problem into {self.path}")
        self.use(sample_profile(self.rollout, self.problems, self.key, self.path, leave=leave, say=self.say))
        self.say(f"profile: {self.path}, {self.profile.summary()}")

    def use(self, profile: Profile) -> None:
        self.profile = profile.first(self.key.num_completions)
        self.digest = self.profile.digest
        self.profile.fill(self.problems)

    def metrics(self) -> dict[str, float]:
        return self.profile.metrics()

    def renew(self, step: int, leave: Callable[[], None]) -> dict[str, float]:
        """Profile the policy as it is after `step` steps, if that is due; its metrics, or none."""
        if not self.every or step == 0 or step % self.every:
            return {}
        key = replace(self.key, model=weights_digest(self.weights()))
        file = f"profile-step-{step}.jsonl"
        path = self.folder / file
        self.drop_other(path, key)
        before, sizes = self.profile, self.allocation.sizes()
        renewed = sample_profile(
            self.rollout, self.problems, key, path, stream=("profile", step), leave=leave, say=self.say
        )
        self.use(renewed)
        try:
            self.allocation.profile_changed()
            self.file = file
        except ValueError as error:
            self.say(f"profile after step {step}: {error}; the earlier profile stays in force")
            self.use(before)
        new_sizes = self.allocation.sizes()
        changed = sum(sizes.get(p.id) != new_sizes.get(p.id) for p in self.problems) / len(self.problems)
        order = spearman(before.pass_rates(), renewed.pass_rates())
        self.say(
            f"profile after step {step}: {renewed.summary()}; order of pass rates kept {order:.2f} (Spearman), group "
            f"size changed for {changed:.2f} of the problems; {self.allocation.outlook()}"
        )
        return renewed.metrics() | {"profile/spearman": order, "profile/frac_group_size_changed": changed}

    def drop_other(self, path: Path, key: ProfileKey) -> None:
        """Remove the profile of a continuation that was abandoned; one of the same weights is of use."""
        stored = read_profile(path)
        ranks.barrier()
        if stored is not None and stored.key != key and ranks.rank() == 0:
            path.unlink()
        ranks.barrier()

    def state_dict(self) -> dict[str, str]:
        return {"file": self.file, "folder": str(self.folder.resolve()), "digest": self.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Put the profile in force back. Raises CheckpointError when it is missing or another one."""
        path = self.path
        if state["file"]:
            self.file = Path(state["file"]).name
            path = self.folder / self.file
            original = Path(state["folder"]) / self.file
            if ranks.rank() == 0 and not path.exists() and original.exists():  # the run goes on under another name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(original, path)
            ranks.barrier()
            profile = read_profile(path)
            if profile is None:
                raise CheckpointError(
                    f"{path}: the profile that the checkpoint goes on with is missing; put it back, or resume from a "
                    "checkpoint before it"
                )
            self.use(profile)
        if self.digest != state["digest"]:
            raise CheckpointError(
                f"{path}: the profile has other rewards than the one the run was trained with; put that one back"
            )
