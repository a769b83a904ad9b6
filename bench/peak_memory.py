"""Peak memory of whole training runs beside their plan: methods, and savings switched on one by one.

    python bench/peak_memory.py [--model qwen2.5-1.5b] [--setting math] [--case GRPO --case SFPO ...] [--out FILE.json]
    python bench/peak_memory.py --case GRPO --new-tokens 64 --problems 64        less to sample, as many to train on

Each case is `python -m fastrl.train` in a process of its own for two steps: random weights in the shape of a known
model, a tokenizer as large as its vocabulary, problems as long as the setting says (math: 256 + 1024 tokens; 16k:
1024 + 15360). Nothing is saved, and what a case has written is removed when it ends. Measured on a GPU are the phases
of `fastrl.memory.watch`, as a share of the card and beside the plan; and what the driver says: memory of the process
and of the card, peaks and means over the backward passes (which is what papers give), energy, and what held the clocks
down. A case that does not fit keeps its row, with the plan alone. Without a GPU all figures are planned, and say so.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from timing import Report
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from fastrl.memory.parts import GIB, MIB
from fastrl.memory.plan import CARDS
from fastrl.models.shapes import find_config, known_shapes, model_shape
from fastrl.plan import PlanConfig, planned, settings_for
from fastrl.settings.run import configure
from fastrl.watch.card_watch import slowed_by


class Sizes(NamedTuple):
    """What a step is made of."""

    prompt: int  # tokens
    completion: int  # tokens
    problems: int = 8


SETTINGS = {"math": Sizes(256, 1024), "16k": Sizes(1024, 15360)}
COMMON = ["--checkpoint-activations", "full", "--kl", "0.001"]
NO_KL = COMMON[:-2]
CASES = {
    "GRPO": [*COMMON, "--group-size", "8"],
    "PPO": [*COMMON, "--objective", "ppo", "--group-size", "1"],
    "REBEL": [*COMMON, "--objective", "rebel", "--group-size", "2"],
    "A*-PO": [*NO_KL, "--objective", "apo", "--group-size", "1", "--num-profile-completions", "2"],
    "SFPO": [*COMMON, "--group-size", "8", "--update", "sfpo"],
    "GXPO": [*COMMON, "--group-size", "8", "--update", "gxpo"],
}
SAVINGS = {
    "no checkpointing": ["--checkpoint-activations", "none"],
    "selective": ["--checkpoint-activations", "selective"],
    "8-bit AdamW": ["--optim.name", "adamw8bit"],
    "bfloat16 gradients": ["--grad-dtype", "bfloat16"],
    "split master": ["--master", "split"],
    "reference on host": ["--reference-on-host"],
    "optimizer on host": ["--offload", "optimizer"],
    "activations on host": ["--offload", "optimizer,activations"],
    "all": ["--optim.name", "adamw8bit", "--grad-dtype", "bfloat16", "--master", "split", "--reference-on-host"],
}
CASES |= {f"GRPO, {name}": [*CASES["GRPO"], *flags] for name, flags in SAVINGS.items()}
BY_THE_DRIVER = {
    "process_backward_mean_mib": "memory/process_mean_mib/backward",
    "process_backward_peak_mib": "memory/process_mib/backward",
    "card_backward_mean_mib": "memory/card_mean_mib/backward",
    "card_backward_peak_mib": "memory/card_mib/backward",
    "card_rollout_peak_mib": "memory/card_mib/rollout",
    "card_update_peak_mib": "memory/card_mib/update",
    "step_j": "energy/step_j",
    "run_kwh": "energy/run_kwh",
    "busy_frac": "gpu/busy_frac",
}
PUBLISHED = {  # share of four H100-80GB in use in the backward, MATH, 1.5B / 3B / 7B (arXiv:2505.20686)
    "A*-PO": (41.6, 49.3, 76.6),
    "GRPO": (42.2, 49.8, 77.8),
    "PPO": (42.6, 55.0, 92.8),
    "REBEL": (63.3, 74.3, 98.8),
}
PUBLISHED_MODELS = ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")


def flags_of(case: str, sizes: Sizes) -> list[str]:
    names = ("--max-prompt-tokens", "--max-new-tokens", "--problems-per-step")
    return [*CASES[case], *(word for name, size in zip(names, sizes, strict=True) for word in (name, str(size)))]


def plan_row(case: str, model: str, sizes: Sizes, card: str) -> dict:
    config = configure(["--model", model, "--data", "gsm8k", "--card", card, *flags_of(case, sizes)], PlanConfig)
    plan = planned(model_shape(model, find_config(model)), settings_for(config, card))
    phases = {f"planned_{phase}_mib": plan.total(phase) / MIB for phase in ("generate", "backward", "step")}
    return {"case": case, **phases, "planned_share": plan.total("backward") / (CARDS[card] * GIB), "fits": plan.fits}


def make_model(name: str, folder: Path, device: str) -> None:
    """Random weights, and a tokenizer as large as the vocabulary that knows the ten digits."""
    config = find_config(name)
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = ["<|endoftext|>", *"0123456789"]
    words += [f"<{i}>" for i in range(len(words), config.vocab_size)]
    Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token=None).save_pretrained(folder)


def make_problems(file: Path, count: int, tokens: int) -> None:
    """Prompts of digits, one token each, all different."""
    rows = [{"prompt": f"{i:04d}".ljust(tokens, "7"), "answer": "1"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured_row(case: str, model: Path, data: Path, sizes: Sizes, out: Path, extra: list[str]) -> dict:
    """Two steps of the program; the second one's memory metrics, or a note on why there are none."""
    command = [sys.executable, "-m", "fastrl.train", "--model", model, "--data", data, "--reward", "exact"]
    command += ["--steps", "2", "--no-save-at-end", "--out", out, *flags_of(case, sizes), *extra]
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    try:
        if ran.returncode:
            said = [line for line in ran.stderr.splitlines() if "rror" in line] or ["no message"]
            return {"note": said[-1][:90]}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    last = [row for row in rows if "grad_norm" in row][-1]
    found = {f"measured_{phase}_mib": last.get(f"memory/measured_mib/{phase}") for phase in ("generate", "train")}
    return {
        **found,
        "torch_peak_mib": last.get("memory/peak_mib"),
        **{name: last.get(metric) for name, metric in BY_THE_DRIVER.items()},
        "step_s": last["step_time"],
        "slowed_by": slowed_by(last) or None,
    }


def ratios(rows: list[dict], model: str, key: str) -> None:
    """Each method over A*-PO, ours and the published one."""
    base = next((row[key] for row in rows if row["case"] == "A*-PO" and row.get(key)), None)
    for row in rows:
        if base and row.get(key):
            row["over_apo"] = row[key] / base
        if row["case"] in PUBLISHED and model in PUBLISHED_MODELS:
            at = PUBLISHED_MODELS.index(model)
            row["published_over_apo"] = PUBLISHED[row["case"]][at] / PUBLISHED["A*-PO"][at]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-1.5b", choices=[n for n in known_shapes() if "qwen" in n])
    parser.add_argument("--setting", choices=SETTINGS, default="math")
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all if not given")
    parser.add_argument("--new-tokens", type=int, help="of a completion, instead of the setting's")
    parser.add_argument("--problems", type=int, default=8, help="of a step")
    parser.add_argument("--card", choices=CARDS, default="h100", help="for the plan")
    parser.add_argument("--out", default="", help="also write the JSON here, after every case")
    args, extra = parser.parse_known_args()
    sizes = SETTINGS[args.setting]._replace(problems=args.problems)
    sizes = sizes._replace(completion=args.new_tokens or sizes.completion)
    gpu = torch.cuda.is_available()
    about = {"measured": gpu, "model": args.model, "setting": args.setting, "sizes": sizes._asdict()}
    report = Report("peak_memory", args.out, **about, note="" if gpu else "planned, not measured")
    key = "measured_train_mib" if gpu else "planned_backward_mib"
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "model", Path(folder) / "problems.jsonl"
        if gpu:
            make_model(args.model, model, "cuda")
            torch.cuda.empty_cache()
            make_problems(data, max(16, sizes.problems), sizes.prompt)
        for case in args.case or CASES:
            row = plan_row(case, args.model, sizes, args.card)
            if gpu:
                row |= measured_row(case, model, data, sizes, Path(folder) / "run", extra)
                if row.get("measured_train_mib"):
                    total = torch.cuda.mem_get_info()[1] / MIB
                    row["measured_share"] = row["measured_train_mib"] / total
                    if row.get("card_backward_mean_mib"):
                        row["backward_mean_share"] = row["card_backward_mean_mib"] / total
            report.add(row)
    ratios(report.rows, args.model, key)
    report.finish()


if __name__ == "__main__":
    main()
