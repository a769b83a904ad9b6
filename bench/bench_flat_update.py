"""In-place interpolation and extrapolation of a flat shard: bandwidth, beside torch's foreach operations.

    python bench/bench_flat_update.py [--elements 100000000 --elements 1500000000] [--out FILE.json]

Bytes are counted as read and written once: SFPO's interpolation 14 per parameter (two float32 in, one out, one bfloat16
out), GXPO's extrapolation 18 from displacements and 22 from gradients. The headline is the share of a device copy's
bandwidth, measured in the same run. Nothing wrong is timed: each result is first set against float64. Without a GPU it
prints what a model of an H100 gives, and says so.
"""

import argparse

import torch
from timing import PEAK_BYTES_PER_S, REACHED_BYTES_PER_S, finish, quantiles, sample, show

from fastrl import flat_library
from fastrl.ops import extrapolate_, interpolate_

BYTES = {"interpolate": 14, "displacements": 18, "gradients": 22}
LOOKAHEAD, ALPHA, LR = 10, 0.5, 1e-6
GATE_ELEMENTS = 1 << 20


def shards(n: int, device: str) -> dict[str, torch.Tensor]:
    """Weights, two AdamW steps of LR from them, and two gradients."""
    generator = torch.Generator(device).manual_seed(0)
    anchor, x0, x1 = (torch.randn(n, generator=generator, device=device) for _ in range(3))
    x1 = x0 * (0.5 + 0.5 * x1)
    u0 = -LR * x0
    return dict(anchor=anchor, x0=x0, x1=x1, u0=u0, theta=anchor + u0 - LR * x1,
                half=torch.empty(n, dtype=torch.bfloat16, device=device))  # fmt: skip


def update(mode: str, s: dict[str, torch.Tensor], backend: str | None) -> None:
    if mode == "interpolate":
        interpolate_(s["theta"], s["anchor"], ALPHA, out_bf16=s["half"], backend=backend)
        return
    inputs = dict(grads=(s["x0"], s["x1"])) if mode == "gradients" else dict(u0=s["u0"])
    extrapolate_(s["theta"], s["anchor"], LOOKAHEAD, ALPHA, **inputs, lr=LR, out_bf16=s["half"], backend=backend)


def foreach(mode: str, s: dict[str, torch.Tensor]) -> None:
    """What one writes with torch alone: a pass for each of the move, the cast, the displacement and its norm."""
    theta, anchor, half = [s["theta"]], [s["anchor"]], [s["half"]]
    before = torch._foreach_sub(theta, anchor)
    torch._foreach_norm(before)
    if mode == "interpolate":
        torch._foreach_lerp_(theta, anchor, 1 - ALPHA)
    else:
        first, second = (s["x0"], s["x1"]) if mode == "gradients" else (s["u0"], before[0] - s["u0"])
        ratio = torch.nan_to_num(second / first, 1.0).clamp_(-2.0, 3.0)
        total = torch.ones_like(ratio)
        for _ in range(LOOKAHEAD - 1):
            total.mul_(ratio).add_(1)
        scale = torch.nan_to_num_(total.div_(ratio.add_(1)), 1.0).clamp_(1.0, LOOKAHEAD / 2 + 1)
        torch.addcmul(anchor[0], before[0], scale, value=ALPHA, out=theta[0])
    torch._foreach_copy_(half, theta)
    torch._foreach_norm(torch._foreach_sub(theta, anchor))


def gate(mode: str, backend: str | None, device: str, n: int = GATE_ELEMENTS) -> float:
    """Largest error against float64, relative to the largest displacement. Raises where it is more than rounding."""
    ours = shards(n, device)
    truth = {name: x.double() for name, x in ours.items() if name != "half"} | {"half": None}
    update(mode, truth, "torch")
    update(mode, ours, backend)
    # one rounding of theta and anchor, which displacements of LR are differences of
    error = ((ours["theta"].double() - truth["theta"]).abs() / ours["anchor"].abs().clamp(min=1e-3)).max().item()
    allowed = 5e-7 if mode != "displacements" else 5e-6  # a ratio of two roundings moves the scale
    if not error <= allowed:
        raise SystemExit(
            f"bench_flat_update: {mode} on {backend} is off by {error:.2e}, allowed {allowed:.0e}: no times"
        )
    if device == "cuda" and not torch.equal(ours["half"], ours["theta"].bfloat16()):
        raise SystemExit(f"bench_flat_update: {mode} on {backend}: bfloat16 weights are not the rounded ones: no times")
    return error


def measured(mode: str, n: int) -> list[dict]:
    s = shards(n, "cuda")
    backends = ["triton", *(["cuda"] if flat_library.find() else [])]
    errors = {f"fastrl {b}": gate(mode, b, "cuda") for b in backends}
    source, target = (torch.empty(n * BYTES[mode] // 8, dtype=torch.float32, device="cuda") for _ in range(2))
    providers = {f"fastrl {b}": (lambda b=b: update(mode, s, b)) for b in backends}
    providers |= {"foreach": lambda: foreach(mode, s), "device copy": lambda: target.copy_(source)}
    times = {name: quantiles(ms) for name, ms in sample(providers).items()}
    copy_ms = times["device copy"]["ms"]
    return [
        {"mode": mode, "elements": n, "provider": name, **q, "gb_per_s": n * BYTES[mode] / q["ms"] / 1e6,
         "of_copy": copy_ms / q["ms"], "speedup_over_foreach": times["foreach"]["ms"] / q["ms"],
         "error": errors.get(name)}
        for name, q in times.items()
    ]  # fmt: skip


def modelled(mode: str, n: int) -> dict:
    moved = n * BYTES[mode]
    ms = {"ms": moved / REACHED_BYTES_PER_S * 1e3, "ms_at_peak": moved / PEAK_BYTES_PER_S * 1e3}
    return {"mode": mode, "elements": n, "provider": "model of an H100, not measured", **ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, action="append", help="of a shard; may be given several times")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    sizes = args.elements or [100_000_000, 875_000_000, 1_500_000_000]
    gpu = torch.cuda.is_available()
    rows = []
    for mode in BYTES:
        for n in sizes:
            rows += measured(mode, n) if gpu else [modelled(mode, n)]
    columns = [
        "mode",
        "elements",
        "provider",
        "ms",
        "ms_20",
        "ms_80",
        "gb_per_s",
        "of_copy",
        "speedup_over_foreach",
        "error",
    ]
    show(rows, columns if gpu else ["mode", "elements", "provider", "ms", "ms_at_peak"])
    finish("flat_update", rows, args.out, measured=gpu)


if __name__ == "__main__":
    main()
