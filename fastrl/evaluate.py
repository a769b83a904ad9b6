"""Score a model on problems: avg@k, pass@k and maj@k with 95 % intervals.

    python -m fastrl.evaluate --model runs/default/checkpoints/step-200 --data arithmetic --k 8
    python -m fastrl.evaluate --model DIR --data problems.jsonl --k 4 --temperature 0.6 --out scores.json

avg@k is the fraction of right ones among k completions, pass@j the unbiased chance that j of them hold a right one,
maj@k whether the most frequent answer is right. The last line of the output is one JSON document.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastrl.base.exits import run_program
from fastrl.base.log import say, versions, write_json
from fastrl.base.setting import setting
from fastrl.data.task import default_rewards, load_task
from fastrl.engine.base import Sampling
from fastrl.engine.opening import frozen_engine
from fastrl.engine.segments import set_segments
from fastrl.models.loading import load_model, load_tokenizer, pick_device
from fastrl.rewards import RewardSet
from fastrl.settings.job import JobConfig
from fastrl.settings.parse import as_dict, parse
from fastrl.settings.sections import SamplingSection
from fastrl.step.metrics import evaluation_metrics
from fastrl.step.rollout import Rollout


@dataclass(kw_only=True)
class EvaluateSampling(SamplingSection):
    """How completions are drawn, and which of them are graded."""

    top_p: float = setting(1.0, "(0, 1]")  # sample from the likeliest tokens of this probability together

    def drawn(self) -> Sampling:
        return replace(super().drawn(), top_p=self.top_p)


@dataclass(kw_only=True)
class EvaluateConfig(JobConfig):
    """A model on problems it is not trained on; a checkpoint is a model."""

    # a data-set name, a file or folder of problems, or owner/name[:config][@revision] of the hub
    data: str = setting("arithmetic", known_as=("dataset", "dataset_name"))
    split: str = "test"  # of the data set: train or test
    k: int = setting(8, "[1, 1e5]")  # completions per problem
    sampling: EvaluateSampling = field(default_factory=EvaluateSampling)
    out: str = ""  # write the JSON document here as well


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Sample, grade and score; the metrics by name, and `num_problems`."""
    sampling = config.sampling.drawn()
    device, dtype = pick_device(config.device, config.dtype)
    set_segments(config.engine, device)
    specs = list(config.reward) or default_rewards(config.data)
    with RewardSet(specs, workers=config.reward_workers, timeout_s=config.reward_timeout) as rewards:
        tokenizer = load_tokenizer(config.model)
        task = load_task(config.data, config.split, config.task, tokenizer, rewards, config.limit)
        say("\n".join(task.report))
        loaded = load_model(config.model, dtype=dtype, device=device, attention=config.attention, ragged="padded")
        with frozen_engine(config.engine, loaded, task.problems, sampling, config.seed) as engine:
            rollout = Rollout(
                engine=engine,
                rewards=rewards,
                tokenizer=tokenizer,
                eos_ids=loaded.eos_ids,
                sampling=sampling,
                seed=config.seed,
                grade_truncated=config.sampling.grade_truncated,
            )
            _, table = rollout.evaluate(task.problems, config.k, sampling)
    return evaluation_metrics(table)


def table(metrics: dict[str, float]) -> list[str]:
    """One line per score, intervals beside it."""
    lines = []
    for name, value in metrics.items():
        if f"{name}/ci95_low" in metrics:
            low, high = metrics[f"{name}/ci95_low"], metrics[f"{name}/ci95_high"]
            lines.append(f"{name:16} {value:7.4f}  [{low:.4f}, {high:.4f}]")
        elif "ci95" not in name:
            lines.append(f"{name:16} {value:7.4g}")
    return lines


def main(argv: list[str]) -> int:
    config = parse(EvaluateConfig, argv, {}).pinned()
    metrics = evaluate(config)
    say("\n".join(table(metrics)))
    document = {"protocol": as_dict(config), "versions": versions(), **metrics}
    print(json.dumps(document))
    if config.out:
        write_json(Path(config.out), document)
    return 0


if __name__ == "__main__":
    run_program(main)
