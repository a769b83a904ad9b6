"""The first minutes on a GPU: what works and what it yields, cheapest and most decisive first, kept stage by stage.

    python bench/gpu.py [--out bench/results] [--budget 520]     what fits into 520 seconds
    python bench/gpu.py --continue                               what has no good result yet, in the newest folder
    python bench/gpu.py --only headline --only kernel_tests      some stages; --list shows all with their limits

Results: OUT/gpu_DATE/STAGE.json and summary.json; docs/gpu.md says how to read them. The stage `install` installs this
checkout where it is not. Exit codes: 0 all stages are good, 1 some failed or are left, 2 no GPU or no such stage.
"""

import argparse
import importlib.util
import signal
import sys
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # fastrl itself may be installed by a stage only

from staged import SKIPPED, Stage, run_stages

from fastrl.base.log import say, versions

BENCH = Path(__file__).resolve().parent
LONG_HEAD = "16384x1536x151936"


def stage(name: str, limit: int, shows: str) -> Stage:
    """One of gpu_stages.py."""
    return Stage(name, limit, (sys.executable, str(BENCH / "gpu_stages.py"), name, "--out", "{out}"), shows)


def benchmark(name: str, limit: int, shows: str, *arguments: str, needs: str = "") -> Stage:
    command = (sys.executable, str(BENCH / f"{name}.py"), "--out", "{out}", *arguments)
    return Stage(name.removeprefix("bench_"), limit, command, shows, needs)


STAGES = [
    stage("environment", 60, "GPU, memory, tools, versions"),
    stage("install", 120, "fastrl is importable, its CUDA library built where there is an nvcc"),
    stage("flat_cuda", 60, "flat updates by the library that nvcc built, right to the bit"),
    stage("flat_nvrtc", 60, "flat updates compiled by NVRTC, right to the bit"),
    stage("flat_triton", 60, "flat updates by Triton, right to the bit"),
    stage("head_parity", 60, "the Triton head against the torch head, at a real vocabulary"),
    stage("train_auto", 90, "three steps of training as a user types it"),
    stage("headline", 60, "head, loss and gradients over the bare products"),
    benchmark("bench_flat_update", 90, "bandwidth of flat updates at 1.5 B elements", "--shape", "1500000000"),
    stage("train_flags", 120, "three steps with each device flag and method, side by side"),
    stage("kernel_tests", 240, "the tests of the kernels on this GPU, in parallel"),
    benchmark("bench_linear_policy_loss", 120, "the fused head and its rivals", "--shape", LONG_HEAD),
    benchmark(
        "peak_memory",
        150,
        "planned and measured memory of whole runs at 1.5 B parameters",
        *("--case", "GRPO", "--case", "A*-PO", "--case", "GXPO", "--new-tokens", "64", "--problems", "64"),
    ),
    benchmark("bench_engine", 300, "vLLM over the trainer's weights, and the cost of new weights", needs="vllm"),
    benchmark("bench_attention", 60, "attention of packed rows by what is installed", "--shape", "16384x2048x12x2x128"),
    benchmark("bench_split_adamw", 60, "AdamW on a split master at 1.5 B elements", "--shape", "1500000000"),
    benchmark("bench_linear_logprob", 120, "log-probabilities and their rivals", "--shape", LONG_HEAD),
    benchmark("bench_policy_loss", 60, "losses of tokens and their rivals"),
    benchmark("bench_apo_loss", 60, "losses of completions and their rivals"),
]


def no_gpu() -> str:
    """Why there is nothing to measure, in one line; empty if a GPU is there."""
    if importlib.util.find_spec("torch") is None:
        return f"no GPU is used: {sys.executable} has no torch"
    import torch

    return "" if torch.cuda.is_available() else f"no GPU: torch {torch.__version__} sees no CUDA device"


def folder_in(out: Path, resume: bool) -> Path:
    """The newest folder of results if they are continued, or one of today that does not exist yet."""
    there = sorted(out.glob("gpu_*"), key=lambda path: path.stat().st_mtime)
    if resume and there:
        return there[-1]
    first = out / f"gpu_{date.today().isoformat()}"
    return next(f for n in range(1, 10**6) if not (f := first if n == 1 else Path(f"{first}.{n}")).exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results")
    parser.add_argument("--budget", type=float, default=520, help="seconds in all")
    parser.add_argument("--continue", action="store_true", dest="resume", help="what has no good result yet")
    parser.add_argument("--only", action="append", choices=[s.name for s in STAGES], help="may be given several times")
    parser.add_argument("--list", action="store_true", help="names, limits in seconds, and what each shows")
    args = parser.parse_args()
    wanted = [s for s in STAGES if not args.only or s.name in args.only]
    if args.list:
        say("\n".join(f"{s.name:20} {s.limit:4} s  {s.shows}" for s in wanted))
        return 0
    if fault := no_gpu():
        print(fault, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends this ends the stage that runs, too
    folder = folder_in(args.out, args.resume)
    results = run_stages(wanted, folder, budget=args.budget, about={"versions": versions()}, resume=args.resume)
    bad = [r["stage"] for r in results if r["rc"] not in (0, SKIPPED)]
    left = [r["stage"] for r in results if r["rc"] == SKIPPED and not r["says"].endswith("not installed")]
    say(f"{folder}/summary.json" + f"; failed: {' '.join(bad)}" * bool(bad) + f"; left: {' '.join(left)}" * bool(left))
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main())
