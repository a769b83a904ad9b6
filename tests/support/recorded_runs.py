"""Short runs, number by number: what each step of each method reports, and the weights that it ends with.

    python tests/support/recorded_runs.py FILE              run them all and write the record
    python tests/support/recorded_runs.py --compare FILE    run them all and say of each what differs first from FILE
    python tests/support/recorded_runs.py --rounding        how this machine rounds

tests/golden/runs.json is the record that tests/run/test_recorded_runs.py compares with. A change of layout leaves it as
it is, to the bit, where numbers are rounded as they were when it was made; elsewhere only the numbers up to the first
step are compared, and not to the bit (`difference`).
"""

import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script
from support.programs import Run, ranks
from support.run_folders import hexadecimal, rows

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
    kept = [hexadecimal(row) for row in rows(folder)]
    (last,) = [p for p in (folder / "checkpoints").iterdir() if p.name == "step-5"]
    files = ["model.safetensors", *(p.name for p in sorted(last.glob("optim-*")))]
    return {"rows": kept, "sha256": {n: hashlib.sha256((last / n).read_bytes()).hexdigest() for n in files}}


def run(name: str, folder: Path) -> dict:
    """Train in `folder` -> the record of the run."""
    started = ranks(folder, ranks_of(name), *arguments(name), "--out", folder / name)
    codes = [process.wait() for process in started]
    assert not any(codes), f"{name}: exit codes {codes}: {started[0].text[-3000:]}"
    return record(folder / name)


def rounding() -> dict[str, str]:
    """Versions of what computes, and sha256 of what fixed operations give on one thread.

    Equal where every sum is taken in the same order and every function rounded alike: on the same kind of processor
    with the same libraries.
    """
    import transformers

    torch.set_num_threads(1)
    generator, hashed = torch.Generator().manual_seed(0), hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        for result in operations(lambda *shape, dtype=dtype: torch.randn(*shape, generator=generator).to(dtype)):
            hashed.update(result.detach().flatten().view(torch.uint8).numpy())
    versions = {module.__name__: module.__version__.partition("+")[0] for module in (torch, transformers)}
    return versions | {"sha256": hashed.hexdigest()}


def operations(draw):
    """Results of what a step consists of, at sizes of the embedded model and at some that divide into no vector."""
    for m, k, n in ((1, 64, 64), (33, 64, 192), (300, 192, 64), (77, 64, 16), (5, 129, 31)):
        a, b = draw(m, k), draw(n, k)
        yield from (a @ b.T, F.linear(a, b, draw(n)), (a @ b.T).T @ a)
    x = draw(37, 203)
    yield from (x.exp(), (x.abs() + 0.1).rsqrt(), F.silu(x), x.softmax(dim=-1), x.log_softmax(dim=-1), x.cos())
    yield from (x.logsumexp(dim=-1), x.sum(), x.sum(dim=0), x.square().mean(dim=-1), x.norm())
    query, key, value = draw(3, 2, 4, 21, 16).requires_grad_().unbind()
    for causal in (True, False):
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        yield from (attended, *torch.autograd.grad(attended.square().sum(), (query, key, value)))
    weights = torch.nn.Parameter(draw(1001))
    optimizer = torch.optim.AdamW([weights], fused=True)
    for _ in range(2):
        weights.grad = draw(1001)
        optimizer.step()
    yield weights


def difference(found: dict, recorded: dict, *, to_the_bit: bool, bfloat16: bool = False) -> str:
    """Row, metric and both numbers of what differs first between two records of a run; nothing if nothing does.

    to_the_bit: every number, and the hashes. Otherwise rows up to the first step: every metric within 1e-3 of it, or
    1e-5. In bfloat16 a token may be another one where rounding differs, and then only the four metrics of LOOSE are
    compared, by its limits.
    """
    if not to_the_bit:
        found, recorded = ({"rows": up_to_the_first_step(one["rows"])} for one in (found, recorded))
    for number, (row, expected) in enumerate(zip(found["rows"], recorded["rows"], strict=False)):
        step = float.fromhex(expected["step"])
        if lost := sorted(expected.keys() - row.keys()):  # a metric that is new changes no other
            return f"row {number} (step {step:g}): metrics {lost} are missing"
        for name in expected:
            one, other = float.fromhex(row[name]), float.fromhex(expected[name])
            same = row[name] == expected[name] if to_the_bit else near(name, one, other, bfloat16)
            if not same:
                return f"row {number} (step {step:g}): {name} is {one!r}, recorded was {other!r}"
    if len(found["rows"]) != len(recorded["rows"]):
        return f"{len(found['rows'])} rows, recorded were {len(recorded['rows'])}"
    files = [name for name in recorded.get("sha256", {}) if found["sha256"].get(name) != recorded["sha256"][name]]
    return f"all numbers are equal, but {files} are not" if files else ""


# wide enough for some other tokens among those of 32 completions; without any, entropy moved by 2e-4
LOOSE = {"reward": 0.1, "entropy": 0.1, "grad_norm": 0.3, "loss": 0.01}


def near(name: str, one: float, other: float, bfloat16: bool) -> bool:
    if math.isnan(one) and math.isnan(other):
        return True
    if bfloat16:
        return name not in LOOSE or abs(one - other) <= LOOSE[name]
    # with other instruction sets (none, AVX2, MKL's compatible one) at most 0.27 of this, in `policy_kl` of rebel
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5)


def up_to_the_first_step(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Evaluation and profile of the model at the start, and the first step of training."""
    first = next(number for number, row in enumerate(rows) if "reward" in row)
    return rows[: first + 1]


def rounding_of_runs(folder: Path) -> dict[str, str]:
    """`rounding` in a process like those of the runs."""
    started = Run(folder, "--rounding", module=__file__, err=True)
    assert started.wait() == 0, Path(started.err).read_text()
    return json.loads(started.text)


def compare(folder: Path, path: Path) -> int:
    """Say of every run what differs first from the record of `path` -> how many differ."""
    recorded, differing = json.loads(path.read_text()), 0
    to_the_bit = rounding_of_runs(folder) == recorded["rounding"]
    print("to the bit" if to_the_bit else "this machine rounds otherwise: up to the first step, within limits")
    for name in RUNS:
        found = run(name, folder)
        said = difference(found, recorded[name], to_the_bit=to_the_bit, bfloat16="bfloat16" in RUNS[name])
        print(f"{name}: {said or 'equal'}", flush=True)
        differing += bool(said)
    return differing


def main(*args: str) -> int:
    if args == ("--rounding",):
        print(json.dumps(rounding()))
        return 0
    with tempfile.TemporaryDirectory() as name:
        if args[0] == "--compare":
            return compare(Path(name), Path(args[1]))
        lines = [f'"rounding": {json.dumps(rounding_of_runs(Path(name)))}']
        lines += [
            f'"{run_name}": ' + json.dumps(run(run_name, Path(name))).replace("}, {", "},\n {") for run_name in RUNS
        ]
        Path(args[0]).write_text("{" + ",\n".join(lines) + "}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
