"""Rewards: built-in verifiers by name, functions of users by file, and their weighted sum.

grade(["so it is \\boxed{42}"], ["42"]) == [1.0]

with RewardSet(["math", "style.py:brevity:0.2"]) as rewards:
    scores = rewards.score(prompts, completions, answers)
"""

from collections import Counter
from dataclasses import dataclass, field
from math import isfinite, nan

from fastrl.base.names import nearest
from fastrl.rewards.base import Grade, Verifier, require_equal_lengths
from fastrl.rewards.exact import Exact, LastCharacter
from fastrl.rewards.math import Math
from fastrl.rewards.user import MOST, TIMEOUT_S, UserReward, load_function

__all__ = ["VERIFIERS", "Exact", "Grade", "LastCharacter", "Math", "RewardSet", "Scores", "Verifier", "grade"]

VERIFIERS = {"exact": Exact, "last_character": LastCharacter, "math": Math}


def grade(texts: list[str], answers: list[str], *, verifier: str = "math") -> list[float]:
    """N texts and N gold answers -> N rewards. Starts and ends the processes it needs; keep a `Math` for repeated use.

    Raises ValueError for lists of different length and for an unknown verifier.
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"unknown verifier {verifier!r}; {hint(verifier)}")
    with VERIFIERS[verifier]() as opened:
        return [each.reward for each in opened.grade(texts, answers)]


@dataclass(slots=True)
class Scores:
    """What a batch of N completions earned."""

    total: list[float]  # [N] weighted sum over the rewards that apply; 0 if none does
    each: dict[str, list[float | None]]  # by reward name, [N], unweighted; None = not applicable
    statuses: dict[str, int]  # completions by `Grade` status, summed over the verifiers, and "error" of user functions
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # completions that a metric is a mean over


class RewardSet:
    """Rewards by spec: `math`, `exact` or `file.py:function`, each with an optional weight behind it (`math:0.5`)."""

    def __init__(self, specs: list[str], *, workers: int = 2, timeout_s: float = TIMEOUT_S):
        """workers: processes at most for `math`. timeout_s: wall time of a call of a user's function; 0 = no limit.

        Raises ValueError for a spec that cannot be used.
        """
        if not specs:
            raise ValueError(f"rewards: got none; expected one of {', '.join(VERIFIERS)} or file.py:function")
        self.weights: dict[str, float] = {}
        self.verifiers: list[Verifier] = []
        self.functions: list[UserReward] = []
        for spec in specs:
            source, weight = split_weight(spec)
            path, colon, function = source.rpartition(":")
            name = function if colon else source
            if name in self.weights:
                raise ValueError(f"reward {spec}: a second reward named {name!r}; rename the function or drop one")
            if colon:
                self.functions.append(UserReward(name, load_function(path, function), timeout_s))
            else:
                self.verifiers.append(Math(workers=workers) if source == "math" else VERIFIERS[source]())
            self.weights[name] = weight

    def score(
        self,
        prompts: list,
        completions: list[str],
        answers: list[str],
        *,
        completion_ids: list[list[int]] | None = None,
        columns: dict[str, list] | None = None,
    ) -> Scores:
        """N prompts (texts or chat messages), completions and answers; columns: further lists of N by name.

        A completion on which a user's function raised earns from it the least of what the others earned and 0: what
        cannot be judged is not better than what is wrong. Functions get copies, the lists stay as they are.

        Raises ValueError for lists of different length, for a user function that cannot be used, and for a total that
        no advantage could be computed from.
        """
        offered = dict(columns or {}) | {
            "prompts": prompts,
            "completions": completions,
            "answers": answers,
            "answer": answers,
        }
        if completion_ids is not None:
            offered["completion_ids"] = completion_ids
        require_equal_lengths("rewards.score", **offered)
        scores = Scores([0.0] * len(completions), {}, {})
        statuses: Counter[str] = Counter()
        for verifier in self.verifiers:
            grades = verifier.grade(completions, answers)
            statuses.update(grade.status for grade in grades)
            scores.each[verifier.name] = [grade.reward for grade in grades]
        for function in self.functions:
            result = function.score(offered)
            if result.errors:
                statuses["error"] += len(result.errors)
                result.rewards = with_least(result.rewards, result.errors, self.weights[function.name])
            scores.each[function.name] = result.rewards
            scores.metrics |= result.metrics
            scores.counts |= result.counts
        for name, rewards in scores.each.items():
            weight = self.weights[name]
            scores.total = [
                total if reward is None else total + weight * reward
                for total, reward in zip(scores.total, rewards, strict=True)
            ]
        for i, total in enumerate(scores.total):
            if not abs(total) <= MOST:
                parts = ", ".join(
                    f"{self.weights[name]:g} x {name} {values[i]}" for name, values in scores.each.items()
                )
                raise ValueError(
                    f"rewards: the total of completion {i} is {total:g}, expected at most {MOST:g}: {parts}"
                )
        scores.statuses = dict(statuses)
        if self.verifiers:
            rewards = scores.each[self.verifiers[0].name]
            hacks = self.watch_hacks(rewards, prompts, completions, answers)
            scores.metrics |= hacks
            scores.counts |= dict.fromkeys(hacks, sum(map(bool, rewards)))
        return scores

    def watch_hacks(
        self, rewards: list[float | None], prompts: list, completions: list[str], answers: list[str]
    ) -> dict[str, float]:
        """Fractions of the rewarded answers: copied from the prompt; not evaluated. Empty if nothing was rewarded."""
        verifier = self.verifiers[0]
        rewarded = copied = unevaluated = 0
        for reward, prompt, completion, gold in zip(rewards, prompts, completions, answers, strict=True):
            if reward:
                found = verifier.extract(completion)
                assert found is not None  # an answer that earned something
                rewarded += 1
                copied += stands_in(found, prompt_text(prompt))
                unevaluated += verifier.unevaluated(found, gold)
        if not rewarded:
            return {}
        return {"reward/answer_in_prompt_frac": copied / rewarded, "reward/unevaluated_frac": unevaluated / rewarded}

    def check_golds(self, answers: list[str]) -> list[Grade] | None:
        """The first refusal of each gold by a verifier, else "right". None if there are only user functions."""
        if not self.verifiers:
            return None
        columns = zip(*(verifier.check_golds(answers) for verifier in self.verifiers), strict=True)
        return [next((grade for grade in grades if not grade.reward), grades[0]) for grades in columns]

    def vote_key(self, text: str) -> str | None:
        """Canonical answer for majority voting, as the first verifier reads it; None without either."""
        return self.verifiers[0].vote_key(text) if self.verifiers else None

    def close(self) -> None:
        for verifier in self.verifiers:
            verifier.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def with_least(rewards: list[float | None], errors: list[int], weight: float) -> list[float | None]:
    """The rewards of a function, with the least of the others and 0 for the completions on which it raised.

    Least by what it adds to the total: of a penalty, whose weight is negative, that is the largest.
    """
    others = [reward for i, reward in enumerate(rewards) if reward is not None and i not in errors]
    least = min([0.0, *others], key=lambda reward: weight * reward)
    return [least if i in errors else reward for i, reward in enumerate(rewards)]


def split_weight(spec: str) -> tuple[str, float]:
    """`math` | `file.py:function`, with an optional `:weight` -> what is before the weight, and the weight (default 1).

    Raises ValueError for everything else.
    """
    source, colon, last = spec.rpartition(":")
    complete = source in VERIFIERS or ".py:" in source  # so that what follows can only be a weight
    if colon and complete:
        try:
            weight = float(last)
        except ValueError:
            weight = nan
        if not isfinite(weight):
            raise ValueError(f"reward {spec}: the weight is {last!r}; expected a finite number such as 0.2")
    else:
        source, weight = spec, 1.0
    if source in VERIFIERS or source.rpartition(":")[0].endswith(".py") and source.rpartition(":")[2]:
        return source, weight
    if source.endswith((".py", ".py:")):
        raise ValueError(f"reward {spec}: which function of the file? Write {source.rstrip(':')}:function")
    raise ValueError(f"reward {spec}: no verifier has this name; {hint(source.partition(':')[0])}")


def hint(name: str) -> str:
    """What a wrong name of a verifier may have been meant for, and all there are."""
    near = nearest(name, VERIFIERS)
    meant = f"did you mean {near!r}? " if near else ""
    return f"{meant}There are: {', '.join(VERIFIERS)}, or file.py:function for your own"


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt, or the contents of its chat messages, as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def stands_in(answer: str, text: str) -> bool:
    """Whether the answer occurs in the text and is not a part of a longer word or number there."""
    start = text.find(answer)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(answer) : start + len(answer) + 1]
        if not (before.isalnum() and answer[:1].isalnum()) and not (after.isalnum() and answer[-1:].isalnum()):
            return True
        start = text.find(answer, start + 1)
    return False
