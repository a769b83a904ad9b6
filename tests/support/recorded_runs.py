"""Short runs, number by number: what each step of each method reports, and the weights that it ends with.

    python tests/support/recorded_runs.py FILE    write the record; test_recorded_runs.py compares with golden/runs.json

A change of layout leaves the record as it is, to the bit, on a machine that rounds as the one that made it.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TIMES = ("timing_s/", "perf/", "memory/", "step_time", "profile/seconds")  # what differs from run to run
COMMON = """
    --steps 5 --problems-per-step 8 --group-size 4 --minibatches 2 --limit 64 --eval-limit 4 --eval-k 2
    --rollouts-every 0 --sample-every 0 --threads 1 --reward-workers 1 --num-profile-completions 4
""".split()
RUNS = {
    "grpo": "--kl 0.01 --objective.entropy 0.001",
    "ppo": "--objective ppo --group-size 1 --problems-per-step 16 --kl 0.01",
    "rebel": "--objective rebel --epochs-per-batch 2 --group-size 2",
    "apo": "--objective apo --group-size 1 --problems-per-step 16",
    "sfpo": "--update sfpo --lookahead 2",
    "gxpo-restore": "--update gxpo --gate cosine",
    "gxpo-keep": "--update gxpo --opt-state keep --ratio coord_grad --gate-stat ema --lookahead 3",
    "sgpo": "--allocation sgpo --num-rollouts-per-step 32",
    "two-ranks": "--update gxpo",
    "split-master": "--update sfpo --dtype bfloat16 --master split",
}


def arguments(name: str) -> list[str]:
    """Flags of a run; what it says itself replaces what is common."""
    own, common = RUNS[name].split(), list(COMMON)
    for flag in [*(arg for arg in own if arg.startswith("--")), *(["--group-size"] if name == "sgpo" else [])]:
        if flag in common:
            at = common.index(flag)
            del common[at : at + 2]
    return common + own


def ranks_of(name: str) -> int:
    return 2 if name == "two-ranks" else 1


def record(folder: Path) -> dict:
    """A run folder -> its metrics as float.hex, and sha256 of its weights and of its optimizer's states."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: float(v).hex() for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
    (last,) = [p for p in (folder / "checkpoints").iterdir() if p.name == "step-5"]
    files = ["model.safetensors", *(p.name for p in sorted(last.glob("optim-*")))]
    return {"rows": kept, "sha256": {n: hashlib.sha256((last / n).read_bytes()).hexdigest() for n in files}}


def start(name: str, folder: Path) -> list[subprocess.Popen]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    count, command = ranks_of(name), [sys.executable, "-m", "fastrl.train", *arguments(name), "--out", folder / name]
    return [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | ({} if count == 1 else dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        ))) for rank in range(count)
    ]  # fmt: skip


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name in RUNS:
            codes = [process.wait() for process in start(name, Path(folder))]
            assert not any(codes), f"{name}: exit codes {codes}"
            runs[name] = record(Path(folder) / name)
    lines = [f'"{name}": ' + json.dumps(run).replace("}, {", "},\n {") for name, run in runs.items()]
    Path(path).write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
