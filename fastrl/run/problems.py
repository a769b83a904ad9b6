"""The problems of a run, and what their lengths ask of its model and of its engine."""

from dataclasses import dataclass

from fastrl.base.log import RunLog
from fastrl.base.types import Problem
from fastrl.data.task import Task, load_task
from fastrl.models.loading import LoadedModel, model_config
from fastrl.rewards import RewardSet
from fastrl.settings.run import TrainConfig
from fastrl.step.canary import PROMPT_TOKENS, TOKENS


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained on and what is evaluated on."""

    task: Task
    evals: list[Task]

    @property
    def problems(self) -> list[Problem]:
        return [*self.task.problems, *(p for e in self.evals for p in e.problems)]

    @property
    def report(self) -> list[str]:
        return [*self.task.report, *(line for e in self.evals for line in e.report)]


def load_work(config: TrainConfig, tokenizer: object, rewards: RewardSet) -> Work:
    """Raises DataError for a data set that cannot be used."""
    wanted = config.evaluation
    return Work(
        task=load_task(config.data, config.split, config.task, tokenizer, rewards, config.limit),
        evals=[load_task(e, "test", config.task, tokenizer, rewards, wanted.eval_limit) for e in wanted.eval],
    )


def check_fit(config: TrainConfig, problems: list[Problem], log: RunLog) -> None:
    """Raise ValueError when the tokenizer writes ids that the model has not; warn of texts longer than its context."""
    architecture = model_config(config.model).get_text_config()
    highest = max(max(p.prompt_ids) for p in problems)
    if highest >= architecture.vocab_size:
        raise ValueError(
            f"--model {config.model}: its tokenizer writes id {highest}, but the model has {architecture.vocab_size} "
            "tokens; use the tokenizer that belongs to it, or resize its embeddings"
        )
    limit = getattr(architecture, "max_position_embeddings", None)
    longest = longest_text(config, problems)
    if limit and longest > limit:
        log.say(
            f"warning: prompts and completions reach {longest} tokens, but the model was made for {limit}; "
            "lower --max-new-tokens or --max-prompt-tokens"
        )


def longest_text(config: TrainConfig, problems: list[Problem]) -> int:
    """Tokens of the longest prompt and completion."""
    return max(len(p.prompt_ids) for p in problems) + config.sampling.max_new_tokens


def longest_sequence(config: TrainConfig, problems: list[Problem], loaded: LoadedModel) -> int:
    """Tokens the engine must hold: of a prompt and its completion, or of the canary where the model is made for it."""
    longest = longest_text(config, problems)
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or longest
    return max(longest, min(limit, PROMPT_TOKENS + TOKENS))
