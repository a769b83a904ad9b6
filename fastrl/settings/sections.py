"""The settings of a run by what they are about. A section is no part of its flags: run.steps is typed --steps."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastrl.base.log import LOGGERS
from fastrl.base.setting import Section, setting
from fastrl.engine.base import Sampling
from fastrl.engine.opening import EngineSection
from fastrl.models.liger import Liger
from fastrl.models.ragged import Ragged
from fastrl.weights.activations import CheckpointMode
from fastrl.weights.shard import MasterKind, Offload


@dataclass(kw_only=True)
class SamplingSection(Section):
    """How completions are drawn, and which of them are graded."""

    max_new_tokens: int = setting(512, "[1, 1e7]", known_as="max_completion_length")  # a completion is cut off there
    temperature: float = setting(1.0, "[0, 100]")  # of sampling; 0 = greedy, where nothing is trained
    grade_truncated: bool = False  # grade cut-off completions instead of giving them 0

    def drawn(self) -> Sampling:
        """What an engine is told of it."""
        return Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens)


@dataclass(kw_only=True)
class TrainSampling(SamplingSection):
    """And what is trained on them: log-probabilities at the same temperature, and pass rates of a profile."""

    old_logprobs: Literal["recompute", "engine"] = "recompute"  # engine: those it sampled with; saves a forward
    # file, where one is needed; empty: found or made in the folder `profiles` beside the run's
    profile: str = setting("", free=True)
    num_profile_completions: int = setting(8, "[1, 1e5]")  # per problem
    # steps between profiles of the policy, for the allocation; 0 = only the first
    reprofile_every: int = setting(0, "[0, 1e9]")

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature:
            raise ValueError(f"--temperature must be above 0 in training, got {self.temperature}")


@dataclass(kw_only=True)
class EvaluationSection(Section):
    """What a run is evaluated on, and when."""

    eval: tuple[str, ...] = setting((), free=True)  # data sets to evaluate before, after and every eval_every steps
    eval_k: int = setting(8, "[1, 1e5]", free=True)  # completions per evaluation problem
    # steps between evaluations; 0 = only before and after
    eval_every: int = setting(0, "[0, 1e9]", free=True, known_as="eval_steps")
    eval_limit: int = setting(0, "[0, 1e9]", free=True)  # use only the first problems of each; 0 = all


@dataclass(kw_only=True)
class StoppingSection(Section):
    """What ends a run before its last step, and which steps are refused."""

    # end the run when avg@k of the first evaluation set reaches it; 0 = never
    stop_at_accuracy: float = setting(0.0, "[0, 1]", free=True)
    # or when it is below that: the policy has collapsed; 0 = never
    stop_below_accuracy: float = setting(0.0, "[0, 1]", free=True)
    # or at the first warning that the policy collapses or games its reward
    stop_on_collapse: bool = setting(False, free=True)
    # a loss or gradient norm that many deviations above the usual is no step; 0 = it is
    spike_sigma: float = setting(6.0, "[0, 1e6]")
    # seconds without any progress after which the run ends, with all stacks; 0 = never
    hang_timeout: float = setting(1800.0, "[0, 1e6]", free=True)

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.stop_at_accuracy <= self.stop_below_accuracy:
            raise ValueError(
                f"--stop-below-accuracy {self.stop_below_accuracy} must be below --stop-at-accuracy "
                f"{self.stop_at_accuracy}, or every evaluation ends the run"
            )

    def judge(self, accuracy: float) -> str:
        """Why an evaluation ends the run; empty where it does not."""
        if 0 < self.stop_at_accuracy <= accuracy:
            return "target"
        return "collapsed" if accuracy < self.stop_below_accuracy else ""


@dataclass(kw_only=True)
class MemorySection(Section):
    """What is kept where and in how many bits."""

    # per forward and backward, a prompt once per group; 0 = 2048 on a CPU, 16384 on a GPU
    tokens_per_microbatch: int = setting(0, "[0, 1e9]", known_as="per_device_train_batch_size")
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # of the gradient buffer
    # selective: keep attention; full: compute all layers again
    checkpoint_activations: CheckpointMode = setting("none", known_as="gradient_checkpointing")
    master: MasterKind = "float32"  # split: bfloat16 weights and the 16 bits they lack, 4 bytes instead of 6
    # optimizer: master and state are on the host while sampling; activations: in the forward
    offload: Offload = setting("none", free=True)
    # its weights are on the device while they score, and on the host otherwise
    reference_on_host: bool = setting(False, free=True)
    # what attends packed rows on a GPU: flash-attn, PyTorch's varlen_attn, or padded rows; auto: the first that works
    ragged: Ragged = "auto"
    liger: Liger = "auto"  # Liger's kernels for norms, rotary positions and gated MLPs; auto: on a GPU, where installed


@dataclass(kw_only=True)
class TrainEngine(EngineSection):
    """What samples, over weights that change."""

    # with vLLM, score fixed tokens by both after every update, and stop where they differ
    canary: bool = setting(True, free=True)


@dataclass(kw_only=True)
class RunSection(Section):
    """How long a run is, where it is written to, and what it goes on from."""

    steps: int = setting(200, "[1, 1e9]", free=True, known_as="max_steps")  # of training
    max_minutes: float = setting(0.0, "[0, 1e7]", free=True)  # stop, save and evaluate after this long; 0 = no limit
    # steps between checkpoints
    save_every: int = setting(0, "[0, 1e9]", free=True, known_as="save_steps")
    save_at_end: bool = setting(True, free=True)  # write one after the last step too; a signal always gets one
    keep: int = setting(2, "[1, 1e6]", free=True, known_as="save_total_limit")  # newest checkpoints to keep, at least 2
    sample_every: int = setting(25, "[0, 1e9]", free=True)  # steps between sample completions on the console; 0 = never
    rollouts_every: int = setting(25, "[0, 1e9]", free=True)  # steps between rollouts/step_N.jsonl files; 0 = never

    name: str = setting("default", free=True)  # of the run
    out: str = setting("", free=True, known_as="output_dir")  # run folder; runs/NAME if empty
    # tensorboard, wandb; metrics.jsonl is always written
    log: tuple[str, ...] = setting((), free=True, known_as="report_to")
    # auto: the newest checkpoint of the run folder; or a checkpoint folder
    resume: str = setting("", free=True, known_as="resume_from_checkpoint")
    allow_change: tuple[str, ...] = setting((), free=True)  # settings that may differ from the checkpoint's
    dry_run: bool = setting(False, free=True)  # print the resolved configuration and the plan, then stop

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", self.name) or set(self.name) == {"."}:
            raise ValueError(f"--name must be 1 to 100 letters, digits, '.', '_' or '-', got {self.name!r}")
        unknown = set(self.log) - set(LOGGERS)
        if unknown:
            raise ValueError(
                f"--log {unknown.pop()}: there is {' and '.join(LOGGERS)}; metrics.jsonl is always written"
            )
