"""Score a model on problems: avg@k, pass@k and maj@k with 95 % intervals.

    python -m fastrl.evaluate --model runs/default/checkpoints/step-200 --data arithmetic --k 8
    python -m fastrl.evaluate --model DIR --data problems.jsonl --k 4 --temperature 0.6 --out scores.json

avg@k is the fraction of right ones among k completions, pass@j the unbiased chance that j of them hold a right one,
maj@k whether the most frequent answer is right. The last line of the output is one JSON document.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastrl.base.exits import run_program
from fastrl.base.log import say, versions, write_json
from fastrl.base.setting import check_bounds, setting
from fastrl.data.task import TaskConfig, default_rewards, load_task
from fastrl.engine.base import Sampling
from fastrl.engine.opening import EngineName, frozen_engine
from fastrl.engine.vllm import VllmConfig
from fastrl.models.loading import EMBEDDED, Attention, load_model, load_tokenizer, pick_device
from fastrl.rewards import RewardSet
from fastrl.settings.parse import as_dict, parse
from fastrl.step.metrics import evaluation_metrics
from fastrl.step.rollout import Rollout


@dataclass(kw_only=True)
class EvaluateConfig:
    model: str = EMBEDDED  # a Hugging Face model folder or name (a checkpoint is one), or `embedded`
    data: str = "arithmetic"  # a data-set name, or a file or folder of problems
    split: str = "test"  # of the data set: train or test
    limit: int = setting(0, "[0, 1e9]")  # use only the first problems; 0 = all
    k: int = setting(8, "[1, 1e5]")  # completions per problem
    reward: tuple[str, ...] = ()  # as in training; the data set's if none
    reward_workers: int = setting(2, "[1, 1024]")  # processes that grade
    task: TaskConfig = field(default_factory=TaskConfig)
    max_new_tokens: int = setting(512, "[1, 1e7]")  # a completion is cut off there
    temperature: float = setting(1.0, "[0, 100]")  # 0 = greedy
    top_p: float = setting(1.0, "(0, 1]")  # sample from the likeliest tokens of this probability together
    grade_truncated: bool = False  # grade cut-off completions instead of giving them 0
    seed: int = setting(0, "[0, 4e9]")  # of sampling
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of weights; auto: bfloat16 on a GPU
    attention: Attention = "sdpa"  # transformers' attn_implementation
    engine: EngineName = "auto"  # hf, vllm; auto: vllm on a GPU where it is installed
    vllm: VllmConfig = field(default_factory=VllmConfig)
    max_num_seqs: int = setting(512, "[1, 1e6]")  # completions the engine decodes together
    out: str = ""  # write the JSON document here as well

    def __post_init__(self):
        check_bounds(self)


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Sample, grade and score; the metrics by name, and `num_problems`."""
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens)
    device, dtype = pick_device(config.device, config.dtype)
    with RewardSet(list(config.reward) or default_rewards(config.data), workers=config.reward_workers) as rewards:
        tokenizer = load_tokenizer(config.model)
        task = load_task(config.data, config.split, config.task, tokenizer, rewards, config.limit)
        say("\n".join(task.report))
        loaded = load_model(config.model, dtype=dtype, device=device, attention=config.attention)
        opened = frozen_engine(
            config.engine, loaded, config.vllm, task.problems, sampling, max_num_seqs=config.max_num_seqs,
            seed=config.seed,
        )  # fmt: skip
        with opened as engine:
            rollout = Rollout(
                engine=engine, rewards=rewards, tokenizer=tokenizer, sampling=sampling, seed=config.seed,
                grade_truncated=config.grade_truncated,
            )  # fmt: skip
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
    config = parse(EvaluateConfig, argv, {})
    metrics = evaluate(config)
    say("\n".join(table(metrics)))
    document = {"protocol": as_dict(config), "versions": versions(), **metrics}
    print(json.dumps(document))
    if config.out:
        write_json(Path(config.out), document)
    return 0


if __name__ == "__main__":
    run_program(main)
