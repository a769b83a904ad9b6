"""Steps of real widths on the pretended device, nothing of them computed, and what was allocated at each phase's peak.

The trainer, its models, rule and batches are those of a run. Completions come ready, so that microbatches are full;
what is large is allocated and not computed (hollow.py). A block belongs to the part that allocated it, or to the tensor
that it holds when a phase begins.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import pretended  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from fastrl.base.types import Completion
from fastrl.models import ragged
from fastrl.models.loading import parameter_shapes
from fastrl.models.shapes import KNOWN
from fastrl.run import models
from fastrl.step.trainer import Trainer
from support.pretend.hollow import hollow
from support.trainers import make_trainer

MIB = 2**20
CONTEXT = 1024  # tokens of every sequence
PARTS = (
    "other", "weights", "gradients", "master", "optimizer", "snapshots", "rule", "critic", "reference", "activations",
    "logits", "workspace", "KV cache",
)  # fmt: skip
LABEL = {name: number for number, name in enumerate(PARTS)}


@dataclass(frozen=True)
class Sizes:
    """Of a step: two microbatches of single completions that are nearly as long as the context."""

    prompt: int = 16  # tokens of the longest
    tokens: int = 4096  # of a microbatch
    problems: int = 0  # of 4 completions; 0: as many as two microbatches take

    @property
    def per_step(self) -> int:
        return self.problems or 2 * self.tokens // CONTEXT // 4


END = "<|endoftext|>"
REWARD = "def alternating(completions, **columns):\n    return [float(i % 2) for i in range(len(completions))]\n"
Measured = dict[str, dict[str, int]]  # phase -> part -> bytes


def write_model(folder: Path, name: str, **changes: object) -> Path:
    """A folder of a known shape, tokenizer and all; its weights are zeros, a hole in the file."""
    from transformers import AutoConfig, Qwen2Tokenizer

    config = AutoConfig.for_model(**KNOWN[name] | changes)
    config.architectures = [
        {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[config.model_type]
    ]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in parameter_shapes(config).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    vocab = {token: i for i, token in enumerate([END, *map(str, range(10))])}
    vocab |= {f"unused {i}": i for i in range(len(vocab), config.vocab_size)}
    Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, eos_token=END, pad_token=END).save_pretrained(folder)
    (folder / "reward.py").write_text(REWARD)
    return folder


class Ready:
    """An engine whose completions are there already, as long as they may be."""

    policy_version = 0

    def progress(self) -> None: ...

    def generate_phase(self):
        return nullcontext()

    def weights_changed(self) -> None:
        self.policy_version += 1

    def close(self) -> None: ...

    def sample(self, requests, sampling) -> list[list[Completion]]:
        n = sampling.max_new_tokens
        return [
            [
                Completion(token_ids=[7] * (n - 1) + [0], rollout_logprobs=[0.0] * n, finish_reason="stop")
                for _ in r.seeds
            ]
            for r in requests
        ]


@dataclass
class Probe:
    """Measures a trainer's phases: the largest sum, and its parts then."""

    trainer: Trainer
    part: str = "other"  # of what is allocated now
    phase: str = ""
    found: Measured = field(default_factory=dict)

    def label(self) -> int:
        """Asked before every operator; the head says itself what is logits."""
        if self.part == "activations" and called_from("linear_logprob.py", "linear_policy_loss.py", "kernels/rows.py"):
            return LABEL["logits"]
        return LABEL["KV cache" if self.phase == "generate" and called_from("models/cache.py") else self.part]

    def begin(self, phase: str, part: str) -> None:
        """The phase before has ended."""
        now = dict(zip(PARTS, pretended.at_peak(), strict=False))
        if self.phase and sum(now.values()) > sum(self.found.get(self.phase, {}).values()):
            self.found[self.phase] = now
        self.phase, self.part = phase, part
        self.settle()
        pretended.reset_peak()

    def settle(self) -> None:
        """Give what is there to its owners."""
        for name, tensors in self.owned().items():
            for tensor in tensors:
                if tensor.is_cuda:
                    pretended.relabel(tensor, LABEL[name])

    def owned(self) -> dict[str, list[Tensor]]:
        learner = self.trainer.learner
        policy, critic, reference = learner.policy, learner.critic, learner.reference
        found = {
            "reference": [*reference.model.parameters()] if reference else [],
            "rule": [*learner.update.state_tensors().values()],
            "optimizer": policy.optimizer.resident(),
            "master": [policy.master if policy.low is None else policy.low],
            "gradients": [policy.flat.grads],
            "weights": [policy.flat.weights, *policy.model.buffers()],
        }
        if critic:
            held = [critic.flat.weights, critic.master if critic.low is None else critic.low]
            found["critic"] = [*held, *critic.optimizer.resident(), *critic.model.buffers()]
            found["gradients"] += [critic.flat.grads]
        return found


def called_from(*files: str) -> bool:
    """Whether one of these files asks, in a forward or in a backward."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(files):
            return True
        frame = frame.f_back
    return False


def around(thing: object, name: str, before, after=lambda result: None) -> None:
    """Call before() and after(result) around a method of one object."""
    method = getattr(thing, name)

    def call(*args, **kwargs):
        before()
        result = method(*args, **kwargs)
        after(result)
        return result

    setattr(thing, name, call)


def watch(trainer: Trainer, probe: Probe) -> None:
    """Tell the probe where phases begin."""
    learner = trainer.learner
    begin = probe.begin

    def keep(part: str):
        probe.part = part

    around(trainer.rollout.engine, "sample", partial(begin, "generate", "workspace"), lambda _: begin("", "other"))
    if learner.reference:
        around(learner.reference, "wake", lambda: None, lambda _: probe.settle())
    around(learner, "prepare", partial(begin, "score", "activations"), lambda _: begin("", "other"))
    around(learner, "accumulate", partial(begin, "backward", "activations"), lambda _: begin("step", "snapshots"))
    if learner.critic:
        around(learner.critic, "wake", partial(begin, "backward", "activations"))
        around(learner.critic, "rest", partial(begin, "", "other"))
    around(learner, "learn", partial(begin, "step", "snapshots"), lambda _: begin("", "other"))
    for name in (
        "gradient",
        "apply",
        "optimizer_step",
        "interpolate",
        "extrapolate",
        "extrapolate_by_tensor",
        "restore",
    ):
        around(learner.policy, name, partial(keep, "workspace"), lambda _: keep("snapshots"))


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the checks at the start of a run that compare numbers, for here there are none."""
    with ExitStack() as stack:
        for module, name, passed in ((models, "check_model", {}), (models, "head_fault", ""), (ragged, "fault", "")):
            stack.enter_context(mock.patch.object(module, name, lambda *given, passed=passed, **how: passed))
        yield


@contextmanager
def real_widths(
    folder: Path, model: Path, *flags: object, sizes: Sizes, samples: bool = False
) -> Iterator[tuple[Trainer, Probe]]:
    """A trainer whose large tensors are never computed, in bfloat16, and its probe.

    samples: by its own engine, where completions else are ready.
    """
    probe: list[Probe] = []
    data = folder / "data.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    prompt = sizes.prompt
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{i}" * (prompt - (i if samples else 0)), "answer": "1"}) + "\n" for i in range(8)
        )
    )
    args = ["--device", "cuda:0", "--dtype", "bfloat16", "--model", model, "--data", data, "--eval", data,
            "--reward", f"{model / 'reward.py'}:alternating", "--max-prompt-tokens", prompt,
            "--max-new-tokens", CONTEXT - prompt, "--tokens-per-microbatch", sizes.tokens,
            "--problems-per-step", sizes.per_step, "--group-size", 4, "--sample-every", 0, *flags]  # fmt: skip
    with unchecked(), hollow(lambda: probe[0].label() if probe else 0):
        trainer = make_trainer(folder, *args)
        if not samples:
            trainer.rollout.engine = Ready()
        probe.append(Probe(trainer))
        yield trainer, probe[0]
