"""Seconds and MiB per stage of the default run's step, beside a plain Hugging Face loop; seconds to the first step.

    python bench/bench_step.py [--steps 20] [--out bench/results/FILE.json]

The rival is what one writes first with transformers: `generate` for the completions, one padded batch, full logits,
torch.optim.AdamW over the parameters; same model, problems, batch size and hyperparameters. Steps of both alternate.
The last line is one JSON document. No time is printed unless fastrl's gradient of a sampled batch equals that of full
logits.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from timing import Report

from fastrl.memory.watch import MemoryWatch
from fastrl.models.loading import load_model
from fastrl.run.resolve import resolve
from fastrl.settings.run import configure
from fastrl.step.batching import make_batch
from fastrl.step.learner import Minibatch
from fastrl.step.trainer import Trainer
from support.trainers import make_trainer


class PlainLoop:
    """GRPO with transformers and torch alone."""

    def __init__(self, trainer: Trainer):
        loaded = load_model("embedded", dtype=torch.float32, device="cpu")
        self.model, self.tokenizer, self.trainer = loaded.model, loaded.tokenizer, trainer
        self.tokenizer.padding_side = "left"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, plan) -> dict[str, float]:
        start = time.perf_counter()
        prompts = self.tokenizer.pad({"input_ids": [p.prompt_ids for p, _ in plan]}, return_tensors="pt")
        with torch.no_grad():
            ids = self.model.generate(
                **prompts,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=10,
                num_return_sequences=8,
            )
        width = prompts["input_ids"].shape[1]
        texts = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        sampled = time.perf_counter()
        answers = [p.answer for p, _ in plan for _ in range(8)]
        rewards = torch.tensor([float(t.split()[-1:] == [a]) for t, a in zip(texts, answers, strict=True)]).view(-1, 8)
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        end = (ids[:, width:] == self.tokenizer.eos_token_id).int()
        mask = end.cumsum(1) - end == 0
        attention = torch.cat([prompts["attention_mask"].repeat_interleave(8, 0), mask.long()], dim=1)
        loss = -(advantage * self.ratio(ids, attention, width) * mask).sum() / mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        done = time.perf_counter()
        return {"rollout": sampled - start, "update": done - sampled, "step": done - start}

    def ratio(self, ids, attention, width):
        """exp(logp - its own value): 1, with the policy gradient."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        logits = self.model(ids, attention_mask=attention, position_ids=positions).logits[:, width - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, ids[:, width:, None])[..., 0]
        return (logp - logp.detach()).exp()


def gate(trainer: Trainer) -> float:
    """Distance of fastrl's gradient of one sampled batch from that of full logits, relative to its norm."""
    groups = trainer.rollout.run(trainer.allocator.take(trainer.completions_per_step), 0)
    batch = make_batch(
        groups, trainer.learner.objective.credit, pad_id=trainer.learner.policy.pad_id, max_new_tokens=10
    )
    trainer.learner.accumulate(Minibatch(batch))
    ours = trainer.learner.policy.flat.grads.clone()
    trainer.learner.policy.zero_grad()
    logits = trainer.learner.policy.model(batch.input_ids[:, :-1]).logits
    logp = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.response_mask[:, 1:]
    (-(batch.credit[:, None] * logp)[mask].sum() / mask.sum()).backward()
    plain = trainer.learner.policy.flat.grads.clone()
    trainer.learner.policy.zero_grad()
    return ((ours - plain).norm() / plain.norm()).item()


def seconds_to_first_step(runs: int) -> tuple[list[float], list[float]]:
    """From starting the command to the end of the evaluation before step 1; and what bare imports take, in turn."""
    bare = [sys.executable, "-c", "import torch; from transformers import AutoModelForCausalLM, Qwen2ForCausalLM"]
    seconds, imports = [], []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(bare, check=True)
        imports.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "fastrl.train", "--steps", "1"], cwd=folder, stdout=subprocess.PIPE, text=True
            )
            for line in process.stdout:
                if line.startswith("eval "):
                    seconds.append(time.perf_counter() - start)
                    break
            process.stdout.read()
            process.wait()
    return seconds, imports


def quantiles(values: list[float]) -> dict[str, float]:
    low, median, high = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
    return {"median_s": median, "p20_s": low, "p80_s": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), "--sample-every", 0, "--rollouts-every", 0)
        error = gate(trainer)
        if error > 1e-4:
            sys.exit(f"gradients differ by {error:.2e} of their norm: no timing")
        report = Report("step", args.out, device="cpu", steps=args.steps, gradient_error=error)
        plain = PlainLoop(trainer)
        times: dict[str, list[float]] = {}
        for i in range(args.steps + 2):
            plan = trainer.allocator.take(trainer.completions_per_step)
            start = time.perf_counter()
            trainer.step()
            whole = time.perf_counter() - start
            spans = {name.removeprefix("timing_s/"): s for name, s in trainer.rollout.spans.take().items()}
            rival = plain.step(plan)
            if i >= 2:  # the first steps fill caches
                for name, value in {**spans, "step": whole}.items():
                    times.setdefault(f"fastrl {name}", []).append(value)
                for name, value in rival.items():
                    times.setdefault(f"plain {name}", []).append(value)
        for name, values in times.items():
            report.add({"what": name, **quantiles(values)})
        trainer.memory = MemoryWatch(resolve(configure([])).plan, "cpu", print)
        used = trainer.step()  # not timed: the tensors that are alive are counted at the end of each phase
    memory = {name.removeprefix("memory/"): mib for name, mib in used.items() if name.startswith("memory/")}
    for phase in ("generate", "train"):
        planned, held = (memory[f"{kind}_mib/{phase}"] for kind in ("planned", "measured"))
        print(f"{phase:16} {held:8.1f} MiB at its end, planned peak {planned:.1f} MiB")
    plain_s, ours_s = (statistics.median(times[f"{who} step"]) for who in ("plain", "fastrl"))
    print(f"plain step / fastrl step: {plain_s / ours_s:.2f}")
    report.write(memory_mib=memory, ratio_plain_to_fastrl=plain_s / ours_s)
    starts, imports = seconds_to_first_step(args.starts)
    print(f"first step starts after {statistics.median(starts):.2f} s   {[round(s, 2) for s in starts]}")
    print(f"importing torch and transformers alone: {statistics.median(imports):.2f} s")
    cpu = platform.processor() or platform.machine()
    report.finish(first_step_s=starts, imports_s=imports, cpu=cpu, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
