"""Problems ready to be sampled: read, golds checked by the verifier that will grade them, prompts encoded."""

from dataclasses import dataclass

from fastrl.base import faults
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import DataError, Problem
from fastrl.data import Dataset, describe_prompt, encode_prompts, find_dataset
from fastrl.data.base import MAX_BAD_FRAC
from fastrl.data.prompts import TEMPLATES
from fastrl.data.template import template_arguments
from fastrl.rewards import RewardSet

SHOWN = 3  # examples of each kind of dropped row on the start-up screen
# golds that their own verifier refuses: 1 % at most, and in small sets these few, up to what bad rows may be. Of the
# named sets Minerva has the most, 5 of 272, and MATH 1 of 7462.
MAX_REFUSED_FRAC = 0.01
FEW_REFUSED = 5


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How problems of a data set become prompts."""

    data_dir: str = ""  # folder with local copies of the named data sets; none: they are fetched from the hub
    template: str = "auto"  # chat, plain, or auto: chat where the tokenizer has a template
    # NAME=VALUE, what the chat template is called with besides, such as enable_thinking=false
    template_args: tuple[str, ...] = setting((), known_as=("chat_template_kwargs", "apply_chat_template_kwargs"))
    instruction: str = "auto"  # appended to every prompt; auto: what the data set asks for
    # longer prompts are dropped and counted
    max_prompt_tokens: int = setting(1024, "[1, 1e7]", known_as="max_prompt_length")

    def __post_init__(self):
        check_bounds(self)
        if self.template not in TEMPLATES:
            raise ValueError(f"--template is {self.template!r}, expected one of {', '.join(TEMPLATES)}")
        template_arguments(self.template_args)  # refuses what has no form
        object.__setattr__(self, "template_args", tuple(sorted(self.template_args)))  # their order says nothing


@dataclass(slots=True, kw_only=True)
class Task:
    name: str
    problems: list[Problem]
    report: list[str]  # lines for the start-up screen: what was read, what was left out and why


def default_rewards(data: str) -> list[str]:
    """The reward specs of a data set, when the user names none."""
    return [find_dataset(data).default_reward]


def load_task(data: str, split: str, config: TaskConfig, tokenizer, rewards: RewardSet, limit: int = 0) -> Task:
    """Read a data set and keep what can be used, the first `limit` problems if that is not 0.

    Raises DataError when nothing is left or the tokenizer cannot write the prompts, ValueError on an unknown template.
    """
    dataset = find_dataset(data)
    faults.at("dataset")
    loaded = dataset.load(split, config.data_dir)
    problems = loaded.problems[:limit] if limit else loaded.problems
    report = [f"data: {dataset.name} ({split}): {len(problems)} problems, {loaded.mapping}"]
    report += [f"  from {loaded.source}"] if loaded.source else []
    if loaded.excluded:
        report.append(f"  excluded by the data set's own list: {len(loaded.excluded)}")
    report += listed("rows that cannot be used", [str(row) for row in loaded.bad_rows])

    problems, refused = gradable(data, problems, rewards)
    report += listed("answers that do not accept themselves", refused)

    instruction = asked_for(dataset, rewards) if config.instruction == "auto" else config.instruction
    problems, too_long = encode_prompts(
        problems,
        tokenizer,
        template=config.template,
        instruction=instruction,
        max_prompt_tokens=config.max_prompt_tokens,
        template_args=template_arguments(config.template_args),
    )
    report += listed(f"prompts over {config.max_prompt_tokens} tokens", [f"{i} ({n})" for i, n in too_long])
    report += unlike_template(problems)
    check_written(data, problems, tokenizer)
    report.append(f"  first prompt, {describe_prompt(problems[0], tokenizer)}")
    return Task(name=dataset.name, problems=problems, report=report)


def asked_for(dataset: Dataset, rewards: RewardSet) -> str:
    """What every prompt ends with: what the data set asks for, where another verifier reads the answers what that one
    asks for, and nothing where no verifier reads them."""
    if not dataset.default_instruction or not rewards.verifiers:
        return ""
    first = rewards.verifiers[0]
    return dataset.default_instruction if first.name == dataset.default_reward else first.instruction


def gradable(data: str, problems: list[Problem], rewards: RewardSet) -> tuple[list[Problem], list[str]]:
    """-> problems whose answer earns its own reward, and "id (status)" of the others: they could only teach noise.

    Raises DataError when there are too many of these: then it is the verifier that is wrong, or the column.
    """
    grades = rewards.check_golds([p.answer for p in problems])
    if grades is None:
        return problems, []
    bad = [(p, g) for p, g in zip(problems, grades, strict=True) if not g.reward]
    if len(bad) > max(MAX_REFUSED_FRAC * len(problems), min(FEW_REFUSED, MAX_BAD_FRAC * len(problems))):
        shown = "".join(f"\n  {p.id}: {p.answer[:60]!r} ({g.status})" for p, g in bad[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"{data}: {len(bad)} of {len(problems)} answers earn nothing when given as their own solution, and "
            f"{MAX_REFUSED_FRAC:.0%} may be so. Is --reward the right verifier for this data? If it is, correct or "
            f"delete these rows:{shown}{more}"
        )
    kept = [p for p, g in zip(problems, grades, strict=True) if g.reward]
    return kept, [f"{p.id} ({g.status})" for p, g in bad]


def check_written(data: str, problems: list[Problem], tokenizer) -> None:
    """Raise DataError when a tokenizer drops what it does not know: the model would be trained on other problems."""
    problem = problems[0]
    text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    lost = set(text) - set(tokenizer.decode(problem.prompt_ids)) - set(" \n\t")
    if len(lost) > len(set(text)) / 4:
        raise DataError(
            f"{data}: the tokenizer of --model has no tokens for {''.join(sorted(lost))[:40]!r}, which problem "
            f"{problem.id} is written with; use a model that knows this text"
        )


def unlike_template(problems: list[Problem]) -> list[str]:
    """A warning where prompts are not what the tokenizer's own template gives."""
    ids = [p.id for p in problems if not p.as_template]
    if not ids:
        return []
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return [
        f"  warning: {len(ids)} prompts are not those of apply_chat_template: their rows have text that looks like "
        f"control tokens, which stays text: {', '.join(ids[:SHOWN])}{more}"
    ]


def listed(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return [f"  dropped {len(items)} {what}: {', '.join(items[:SHOWN])}{more}"]
