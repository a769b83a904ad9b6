"""What a verifier is: texts and gold answers in, one grade per text out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True, frozen=True)
class Grade:
    """The reward of one completion and why it got it.

    right         the answer is the gold answer
    wrong         an answer was found and is another one
    no_box        no answer where the verifier looks for it, or an empty one
    too_long      the answer or the gold is longer or deeper nested than the verifier reads
    unparsed      an answer was found and cannot be read or compared
    soft_timeout  comparing took too much CPU time and was interrupted
    hard_timeout  comparing could not be interrupted; its process was killed
    died          processes that compared it were lost, several times in a row
    error         a user's reward function raised
    """

    reward: float
    status: str

    @classmethod
    def of(cls, status: str) -> "Grade":
        """Reward 1 for "right" and 0 for every other status."""
        return cls(1.0 if status == "right" else 0.0, status)


class Verifier(ABC):
    """Compares completions with gold answers. A grade depends on its own completion and answer only.

    Use it in a `with` statement, or call `close`; a closed verifier may be used again.
    """

    name: ClassVar[str]
    # what a prompt asks for, so that the answer stands where it is looked for; empty: any text has one
    instruction: ClassVar[str] = ""

    @abstractmethod
    def grade(self, completions: list[str], answers: list[str]) -> list[Grade]:
        """N texts and their N gold answers -> N grades. Lists of different length: ValueError."""

    @abstractmethod
    def extract(self, completion: str) -> str | None:
        """The answer as it stands in the text; None if there is none."""

    @abstractmethod
    def vote_key(self, completion: str) -> str | None:
        """Canonical text of the answer: equal keys are one vote. None if there is no answer."""

    @abstractmethod
    def as_completion(self, answer: str) -> str:
        """A completion that states this answer as the verifier expects it."""

    def check_golds(self, answers: list[str]) -> list[Grade]:
        """Grades each gold answer as its own completion; one that is not "right" can never be earned."""
        return self.grade([self.as_completion(answer) for answer in answers], answers)

    def unevaluated(self, answer: str, gold: str) -> bool:
        """Whether the answer leaves an operation undone that the gold has done (a hack to watch)."""
        return False

    def close(self) -> None:  # noqa: B027 (only some verifiers have processes)
        """Ends the worker processes, if there are any."""

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def require_equal_lengths(where: str, **lists: list) -> None:
    """ValueError unless all lists have the same length."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"{where}: got {got}; expected one of each per completion")
