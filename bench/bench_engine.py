"""The engines over one set of weights: tokens per second, and what a change of the weights costs.

    python bench/bench_engine.py [--model NAME] [--prompts 32] [--group-size 8] [--max-new-tokens 64] [--out FILE.json]

Random weights in the shape of a known model, or `tiny`. vLLM samples with a seed per request and with one per step; on
a GPU also on its first model runner, in a process of its own, unless VLLM_USE_V2_MODEL_RUNNER names one. Nothing is
timed unless vLLM's log-probabilities of its own completions are the trainer's. The weight change of the shared buffer
is set beside what it replaces, load_weights from the trainer's tensors. On a GPU also: giving the KV cache back and
restoring it, with the free memory before and after. Without a GPU the times are of the CPU and of a small model, and
say nothing of a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from timing import Report
from transformers import AutoModelForCausalLM, Qwen2Config

from fastrl.engine.base import Request, Sampling
from fastrl.engine.hf import HFEngine
from fastrl.engine.vllm import VllmConfig, VllmEngine, installed_version
from fastrl.engine.vllm_random import RUNNER
from fastrl.models.shapes import find_config
from fastrl.weights.buffer import FlatParams

TINY = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
ALLOWED_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.3}  # mean difference from the trainer's log-probabilities
STOP = 1  # an id that ends a completion; with random weights it hardly ever comes


def build(name: str, device: str) -> tuple[torch.nn.Module, FlatParams]:
    torch.manual_seed(0)
    config = Qwen2Config(**TINY) if name == "tiny" else find_config(name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model, FlatParams(model, grad_dtype=None)


def requests(model: torch.nn.Module, prompts: int, group_size: int, length: int = 200) -> list[Request]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size, (prompts, length), generator=g).tolist()
    return [Request(prompt_ids=p, seeds=[1000 * i + k for k in range(group_size)]) for i, p in enumerate(ids)]


@torch.no_grad()
def difference(model: torch.nn.Module, wanted: list[Request], engine, sampling: Sampling) -> float:
    """Mean |difference| in nats between the engine's log-probabilities and the model's."""
    found = []
    for request, completions in zip(wanted, engine.sample(wanted, sampling), strict=True):
        for c in completions:
            ids = torch.tensor([request.prompt_ids + c.token_ids], device=model.device)
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float() / sampling.temperature
            logp = logits.log_softmax(-1).gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]
            found.append((logp.cpu() - torch.tensor(c.rollout_logprobs)).abs())
    return torch.cat(found).mean().item()


def gate(model: torch.nn.Module, engine: VllmEngine, flat: FlatParams, sampling: Sampling) -> float:
    """The worse difference of before and after a change of the weights; SystemExit if it is not rounding."""
    few = requests(model, 2, 2)
    before = difference(model, few, engine, sampling)
    with torch.no_grad():
        flat.weights.mul_(1.02)
    engine.weights_changed()
    error = max(before, difference(model, few, engine, sampling))
    allowed = ALLOWED_NATS[flat.weights.dtype]
    if not error <= allowed:
        raise SystemExit(f"bench_engine: vLLM is off by {error:.2e} nats, allowed {allowed:.0e}: no times")
    return error


def seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(taken: list[float]) -> dict[str, float]:
    return {"ms": 1e3 * statistics.median(taken), "ms_min": 1e3 * min(taken), "ms_max": 1e3 * max(taken)}


def generation(hf: HFEngine, vllm: VllmEngine, wanted: list[Request], sampling: Sampling, repeats: int) -> list[dict]:
    samplers: dict[str, Callable] = {"hf": hf.sample}
    chosen = vllm.seeds
    for seeds in ("request", "step"):
        vllm.seeds = seeds
        samplers[f"vllm, {vllm.how}"] = with_seeds(vllm, seeds)
    tokens, taken = {}, {name: [] for name in samplers}
    for number in range(repeats + 1):  # the first warms up
        for name, sample in samplers.items():
            vllm.weights_changed()  # each generation starts without cached prefixes, as a training step's does
            groups = []
            took = seconds(lambda sample=sample, groups=groups: groups.extend(sample(wanted, sampling)))
            tokens[name] = sum(len(c.token_ids) for group in groups for c in group)
            if number:
                taken[name].append(took)
    vllm.seeds = chosen
    slowest = statistics.median(taken["hf"])
    return [
        {
            "what": "generation",
            "provider": name,
            **spread(t),
            "tokens": tokens[name],
            "tokens_per_s": tokens[name] / statistics.median(t),
            "speedup_over_hf": slowest / statistics.median(t),
        }
        for name, t in taken.items()
    ]


def with_seeds(engine: VllmEngine, seeds: Literal["request", "step"]) -> Callable:
    def sample(wanted: list[Request], sampling: Sampling) -> list:
        engine.seeds = seeds
        return engine.sample(wanted, sampling)

    return sample


def on_first_runner() -> list[dict]:
    """The rows of vLLM's generation in a process whose vLLM takes its first model runner."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--out", str(out)]
        done = subprocess.run(command, env=os.environ | {RUNNER: "0"})
        if done.returncode:  # what can be measured here is measured all the same
            return [{"what": "generation", "provider": "vllm, first model runner", "note": f"exit {done.returncode}"}]
        rows = json.loads(out.read_text())["rows"]
    return [row for row in rows if row["what"] == "generation" and row["provider"] != "hf"]


def weight_change(model: torch.nn.Module, engine: VllmEngine, repeats: int) -> list[dict]:
    def shared() -> None:
        engine.weights_changed()
        engine.drop_prefixes()

    def loaded() -> None:
        engine.runner.get_model().load_weights((n, p.detach()) for n, p in model.named_parameters())
        engine.drop_prefixes()

    moved = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    rows = []
    for name, call, mib in (("shared buffer", shared, 0.0), ("load_weights", loaded, moved)):
        rows.append(
            {
                "what": "weight change",
                "provider": name,
                **spread([seconds(call) for _ in range(repeats)]),
                "copied_mib": mib,
            }
        )
    return rows


def cache_pages(engine: VllmEngine, repeats: int) -> list[dict]:
    def free_mib() -> float:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 2**20

    taken, held, released, again = {"release": [], "restore": []}, [], [], []
    for _ in range(repeats):
        held.append(free_mib())
        engine.quiesce()
        engine.drop_prefixes()
        taken["release"].append(seconds(engine.pages.release))
        released.append(free_mib())
        taken["restore"].append(seconds(engine.pages.restore))
        again.append(free_mib())
    return [
        {
            "what": f"KV cache, {name}",
            "provider": "fastrl",
            **spread(t),
            "kv_mib": engine.pages.nbytes / 2**20,
            "freed_mib": released[0] - held[0],
            "lost_mib": held[0] - again[-1],
        }
        for name, t in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="qwen2.5-1.5b" if gpu else "tiny")
    parser.add_argument("--prompts", type=int, default=64 if gpu else 16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=512 if gpu else 32)
    parser.add_argument("--kv-gib", type=float, default=20.0 if gpu else 1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    try:
        installed_version()
    except ValueError as error:  # a machine without vLLM still has its row in a list of results
        Report("engine", args.out).finish(note=str(error))
        return
    first = on_first_runner() if gpu and RUNNER not in os.environ else []
    model, flat = build(args.model, "cuda" if gpu else "cpu")
    start = time.perf_counter()
    vllm = VllmEngine(
        model,
        flat,
        VllmConfig(),
        eos_ids=(STOP,),
        num_tokens=model.config.vocab_size,
        max_model_len=200 + args.max_new_tokens,
        max_num_seqs=512,
        kv_bytes=int(args.kv_gib * 2**30),
    )
    start_s = time.perf_counter() - start
    hf = HFEngine(model, eos_ids=(STOP,), pad_id=0, num_tokens=model.config.vocab_size)
    sampling = Sampling(temperature=1.0, max_new_tokens=args.max_new_tokens)
    error = gate(model, vllm, flat, Sampling(temperature=0.8, max_new_tokens=16))
    wanted = requests(model, args.prompts, args.group_size)
    report = Report(
        "engine",
        args.out,
        model=args.model,
        vllm=vllm.version,
        error_nats=error,
        start_s=start_s,
        measured_on="gpu" if gpu else "cpu",
    )
    report.add(*first)
    report.add(*generation(hf, vllm, wanted, sampling, args.repeats))
    report.add(*weight_change(model, vllm, 5 * args.repeats))
    report.add(*(cache_pages(vllm, args.repeats) if gpu else []))
    vllm.close()
    report.finish()


if __name__ == "__main__":
    main()
