"""The stages of `make gpu` that are no benchmark, each a program: python bench/gpu_stages.py STAGE --out FILE.json

What a stage finds is in FILE.json as soon as it is known, so that one that is killed or crashes keeps what it had.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # `timing` asks for fastrl, which may not be installed yet

from timing import OURS, Report, measure

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("cuda", "nvrtc", "triton")
HEAD = (1536, 151936)  # hidden size and vocabulary of a model of 1.5 B parameters
TOKENS = 16384
TOOLS = ("make", "git", "cc", "cmake", "nvcc")
KERNEL_TESTS = ("tests/kernels", *(f"tests/weights/test_{name}.py" for name in ("nvrtc", "halves", "moves", "shard")))
WORKERS = 8
# three steps of the embedded task, with a checkpoint on the way and one at the end
SMALL = "--steps 3 --eval-limit 8 --eval-k 1 --problems-per-step 8 --group-size 4 --save-every 2".split()
RUNS = {
    "auto": "",
    "cuda, SFPO, KL, reference on host": "--device cuda --update sfpo --lookahead 2 --kl 0.01 --reference-on-host",
    "offload, selective, split master, GXPO": "--offload optimizer,activations --checkpoint-activations selective "
    "--master split --update gxpo",
    "PPO": "--objective ppo --group-size 1",
    "A*-PO": "--objective apo --group-size 1 --num-profile-completions 2",
    "bfloat16 gradients": "--grad-dtype bfloat16",
    "float32": "--dtype float32",
}
SEEN = ("step_time", "timing_s/rollout", "timing_s/update", "grad_norm", "memory/peak_mib")


def environment(report: Report) -> None:
    """What this machine is: GPU, memory, tools, and the versions of everything that Python finds."""
    from importlib.metadata import distributions

    gpu, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    report.add({"what": "GPU", "name": gpu.name, "multiprocessors": gpu.multi_processor_count})
    report.add({"what": "memory", "free_mib": free / 2**20, "total_mib": total / 2**20})
    free_gb = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    nodes = sorted(map(str, Path("/dev").glob("nvidia*")))
    report.add({"what": "host", "cores": os.cpu_count(), "disk_free_gb": free_gb, "nodes": nodes})
    report.add({"what": "tools", **{tool: shutil.which(tool) for tool in TOOLS}})
    report.add({"what": "packages", **{str(d.metadata["Name"]): d.version for d in distributions()}})
    says = f"{gpu.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, torch {torch.__version__}"
    report.write(says=says, complete=True)


def install(report: Report) -> None:
    """fastrl of this checkout into this Python, with its CUDA library where there is an nvcc; nothing where it is."""
    missing = what_lacks()
    says = f"installed: {missing}" if missing else "was installed"
    if missing:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        if subprocess.run(command).returncode:  # an nvcc that does not compile must not cost all that follows
            subprocess.run([*command, "--config-settings=wheel.cmake=false"], check=True)
            says += "; without its CUDA library, which could not be built"
    report.finish(says=says)


def what_lacks() -> str:
    """Why fastrl must be installed, empty if it is. Asked in another folder, where no checkout is found by chance."""
    here = f"import fastrl.kernels.rows as r, sys; sys.exit(not r.__file__.startswith({str(ROOT)!r}))"
    if subprocess.run([sys.executable, "-c", here], cwd=tempfile.gettempdir(), capture_output=True).returncode:
        return "this Python does not import fastrl of this checkout"
    from fastrl.weights import library

    if library.find() is None:
        return "the CUDA library is not built" if all(map(shutil.which, ("cmake", "nvcc"))) else ""
    try:
        library.load(library.find())
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def flat(report: Report, backend: str) -> None:
    """A small flat update, right to the bit, by one backend: compiled, loaded and launched."""
    from fastrl.weights import backends, library

    if backend == "cuda" and library.find() is None:
        report.finish(says="not built: there was no cmake or no nvcc")
        return
    begin = time.perf_counter()
    backends.try_out(backend, torch.device("cuda", 0))
    took = time.perf_counter() - begin
    report.add({"backend": backend, "seconds": took})
    report.finish(says=f"right, {took:.1f} s with its compilation")


def head_parity(report: Report) -> None:
    """The Triton head against the torch one at a real head; SystemExit with what differs."""
    from fastrl.kernels.parity import head_fault

    hidden, vocabulary = HEAD
    weight = torch.randn(vocabulary, hidden, device="cuda").bfloat16()
    begin = time.perf_counter()
    fault = head_fault(weight)
    report.add({"H": hidden, "V": vocabulary, "fault": fault, "seconds": time.perf_counter() - begin})
    report.finish(says=fault or "the Triton head is right")
    if fault:
        sys.exit(fault)


def headline(report: Report) -> None:
    """Head, loss and both gradients in one pass, beside the three products that it cannot do without."""
    from bench_linear_policy_loss import BARE, GATE_ROWS, fresh

    def two(rows: int) -> dict:
        return {name: provider for name, provider in fresh(rows, *HEAD).items() if name in (OURS, BARE)}

    case = {"N": TOKENS, "H": HEAD[0], "V": HEAD[1]}
    report.add(*measure("headline", partial(two, GATE_ROWS), partial(two, TOKENS), yardstick=BARE, case=case))
    report.finish()


def train(report: Report, names: list[str]) -> None:
    """Runs of three steps side by side, one row each as it ends; SystemExit names those that failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(number) for number, name in enumerate(names)}
        running = {name: started(name, folder) for name, folder in folders.items()}
        begin, failed = time.perf_counter(), []
        while running:
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                failed += [name] if code else []
                report.add({"run": name, "rc": code, "seconds": time.perf_counter() - begin, **outcome(folders[name])})
            time.sleep(0.2)
    done = f"{len(names) - len(failed)} of {len(names)} runs"
    report.finish(says=f"{done}; failed: {'; '.join(failed)}" if failed else done)
    if failed:
        sys.exit("\n".join(line for row in report.rows if row["rc"] for line in row["tail"]))


def started(name: str, folder: Path) -> subprocess.Popen:
    folder.mkdir()
    engine = [] if name == "auto" else ["--engine", "hf"]  # of several, none may take what is free for its cache
    command = [sys.executable, "-m", "fastrl.train", *SMALL, *engine, "--out", str(folder / "run"), *RUNS[name].split()]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def outcome(folder: Path) -> dict:
    """The last step's times and memory, what the run said before its first step, and the end of what it said."""
    said, metrics = (folder / "log").read_text(errors="replace").splitlines(), folder / "run" / "metrics.jsonl"
    start = next((number for number, line in enumerate(said) if line.startswith("start-up took")), 0)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [row for row in rows if "step_time" in row]
    last = {key: value for key, value in steps[-1].items() if key in SEEN} if steps else {}
    return {"steps": len(steps), **last, "start": said[: start + 1], "tail": said[-12:]}


class Recorder:
    """A plugin of pytest: counts and names of what failed, in the report as they come."""

    def __init__(self, report: Report):
        self.report, self.counts, self.failed = report, {"passed": 0, "failed": 0, "skipped": 0}, []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append({"test": report.nodeid, "why": report.longreprtext[-500:]})
        if report.failed or self.counts["passed"] % 50 == 0:
            self.write()

    def write(self) -> None:
        says = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        self.report.write(says=says, counts=self.counts, failed=self.failed)


def kernel_tests(report: Report) -> None:
    """The tests of the kernels, in parallel where pytest-xdist is installed; SystemExit unless all pass."""
    import pytest

    os.chdir(ROOT)
    recorder = Recorder(report)
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    code = pytest.main(["-q", "-p", "no:cacheprovider", *parallel, *KERNEL_TESTS], plugins=[recorder])
    recorder.write()
    sys.exit(code)


STAGES = {
    "environment": environment,
    "install": install,
    **{f"flat_{backend}": partial(flat, backend=backend) for backend in BACKENDS},
    "head_parity": head_parity,
    "headline": headline,
    "train_auto": partial(train, names=["auto"]),
    "train_flags": partial(train, names=[name for name in RUNS if name != "auto"]),
    "kernel_tests": kernel_tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    STAGES[args.stage](Report(args.stage, args.out, measured=torch.cuda.is_available()))


if __name__ == "__main__":
    main()
