"""The profile as data: rewards of N completions of every problem, and the key that says what they depend on.

    pass_rate(x) = (1/N) sum_i right(x, y_i)        y_1..y_N ~ the model, at the run's temperature

One file serves the allocations (pass_rate) and A*-PO (optimal_value, from the raw rewards). It has JSON lines:

    {"fastrl_profile": 1, "key": {...}, "num_problems": 7473}                                        first line
    {"id": "gsm8k/train/0", "rewards": [1.0, 0.0], "right": [1.0, 0.0], "lengths": [93, 120]}        one a problem
    {"num_rollouts": 2048, "num_tokens": 310000, "seconds": 41.2}                                    after every chunk

The totals are those so far. What lies behind the last ones is an unfinished chunk and does not count.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from fastrl.base.types import DataError, Problem
from fastrl.passrates.key import ProfileKey, digest
from fastrl.step.metrics import pass_at

VERSION = 1
BAR = 40  # characters


@dataclass(kw_only=True)
class Profile:
    key: ProfileKey
    num_problems: int
    rows: list[dict] = field(default_factory=list)  # as in the file, in the order of the problems
    num_rollouts: int = 0
    num_tokens: int = 0  # prompts, once per completion, and completions
    seconds: float = 0.0
    num_bytes: int = 0  # of the file, without an unfinished chunk

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.num_problems

    @property
    def digest(self) -> str:
        return digest(self.rows)

    def header(self) -> dict:
        return {"fastrl_profile": VERSION, "key": asdict(self.key), "num_problems": self.num_problems}

    def totals(self) -> dict[str, float]:
        return {"num_rollouts": self.num_rollouts, "num_tokens": self.num_tokens, "seconds": self.seconds}

    def first(self, n: int) -> "Profile":
        """Only the first n completions of each problem; the totals stay, they are what it cost."""
        cut = [{k: v[:n] if isinstance(v, list) else v for k, v in row.items()} for row in self.rows]
        return replace(self, rows=cut, key=replace(self.key, num_completions=n))

    def fill(self, problems: Sequence[Problem]) -> None:
        """Set `profile_rewards` and `profile_right` of every problem."""
        rows = {row["id"]: row for row in self.rows}
        for problem in problems:
            problem.profile_rewards = torch.tensor(rows[problem.id]["rewards"], dtype=torch.float32)
            problem.profile_right = torch.tensor(rows[problem.id]["right"], dtype=torch.float32)

    def num_right(self) -> list[float]:
        """Right completions of each problem; a graded reward counts as far as it goes."""
        return [sum(row["right"]) for row in self.rows]

    def pass_rates(self) -> list[float]:
        return [right / self.key.num_completions for right in self.num_right()]

    def metrics(self) -> dict[str, float]:
        rates = self.pass_rates()
        return {f"profile/{name}": value for name, value in self.totals().items()} | {
            "profile/pass_rate": sum(rates) / len(rates),
            "profile/frac_never_solved": sum(r == 0 for r in rates) / len(rates),
            "profile/frac_always_solved": sum(r == 1 for r in rates) / len(rates),
        }

    def at_limit(self) -> str:
        """How many completions are as long as they may be: nearly all of these were cut off."""
        limit = self.key.sampling["max_new_tokens"]
        lengths = [length for row in self.rows for length in row["lengths"]]
        share = sum(length >= limit for length in lengths) / len(lengths)
        return f"{100 * share:.0f} % of the profile's completions reached --max-new-tokens {limit:g}"

    def summary(self) -> str:
        values = self.metrics()
        return (
            f"{self.num_problems} problems x {self.key.num_completions} completions: {self.num_rollouts} rollouts, "
            f"{self.num_tokens} tokens, {self.seconds:.1f} s; pass rate {values['profile/pass_rate']:.3f}, "
            f"never solved {values['profile/frac_never_solved']:.3f}, always {values['profile/frac_always_solved']:.3f}"
        )

    def histogram(self) -> list[str]:
        """Problems by right completions, and pass@k."""
        n, right = self.key.num_completions, self.num_right()
        counts = Counter(round(s) for s in right)
        longest = max(counts.values())
        width = len(str(n))
        lines = [
            f"{s:{width}}/{n} {counts[s]:7} {'#' * round(BAR * counts[s] / longest)}".rstrip() for s in range(n + 1)
        ]
        ks = sorted({1 << i for i in range(n.bit_length())} | {n})
        solved = [(k, sum(pass_at(k, int(s), n) for s in right) / len(right)) for k in ks if k <= n]
        return [*lines, "  ".join(f"pass@{k} {share:.3f}" for k, share in solved)]


def read_profile(path: Path) -> Profile | None:
    """What is finished of a profile's file; None if nothing is. Raises DataError for a file that is no profile."""
    if not path.exists():
        return None
    lines = path.read_bytes().split(b"\n")[:-1]  # the last line has no end yet, or is empty
    if not lines:
        return None
    try:
        header = json.loads(lines[0])
        version = header["fastrl_profile"]
        profile = Profile(key=ProfileKey(**header["key"]), num_problems=header["num_problems"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}:1: not the first line of a profile; make one by python -m fastrl.profile") from error
    if version != VERSION:
        raise DataError(f"{path}: a profile of version {version}, but this fastrl reads {VERSION}; make a new one")
    profile.num_bytes = offset = len(lines[0]) + 1
    chunk = []
    for number, line in enumerate(lines[1:], start=2):
        offset += len(line) + 1
        try:
            row = json.loads(line)
            if "id" in row:
                chunk.append({name: row[name] for name in ("id", "rewards", "right", "lengths")})
            else:
                profile = replace(profile, rows=profile.rows + chunk, num_bytes=offset, **row)
                chunk = []
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: not a line of a profile; delete the file to make it anew") from error
    return profile


def default_path(key: ProfileKey, folder: Path) -> Path:
    """Where the programs keep a profile, given the folder of the run folders."""
    return folder / "profiles" / f"{key.digest}.jsonl"


def find_profile(key: ProfileKey, named: str, folder: Path) -> tuple[Path, str]:
    """The file of a run's profile, and a line that says what is there: `named`, or one by its key.

    Raises ValueError when the named file is missing, or holds the profile of another run.
    """
    path = Path(named).expanduser() if named else default_path(key, folder)
    stored = read_profile(path)
    if stored is None:
        if named:
            raise ValueError(
                f"--profile {named}: there is no such profile; make it by python -m fastrl.profile --out {named}, or "
                "leave --profile out"
            )
        return path, f"profile: to be made, {key.num_completions} completions a problem, into {path}"
    key.refuse_other(stored.key, path)
    if not stored.complete:
        return path, f"profile: {path}, to be completed ({len(stored.rows)} of {stored.num_problems} problems)"
    return path, f"profile: {path}, {stored.first(key.num_completions).summary()}"
