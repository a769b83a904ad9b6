"""GXPO (arXiv:2605.06755): two probe steps, an extrapolation per coordinate, one corrective step; per minibatch.

    1  theta_1 = step(theta_0, g0),  theta_2 = step(theta_1, g1)
    2  r = second / first of the gradients (or of AdamW's directions),   scale = S_K(r) / S_2(r)    as ops.extrapolate_
    3  theta~  = theta_0 + alpha scale (theta_2 - theta_0)
    4  theta'  = step(theta~, grad L(theta~))

Three backward passes whatever K, 8 bytes per parameter for the anchor and the first probe, and a copy of the optimizer
state with opt_state=restore; one pass and no buffer after the gate has closed. On a diagonal quadratic under gradient
descent it is SFPO with the same K and alpha.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastrl.base.setting import check_bounds, setting
from fastrl.updates.base import Accumulate
from fastrl.updates.gate import Gate
from fastrl.weights.moves import FlatStats, extrapolate_, interpolate_
from fastrl.weights.moves_ref import BLOCK, direction, series

THRESHOLDS = {"grad_norm": 3.0, "entropy": 3.0, "cosine": 0.15, "off": 1.0}
TINY = 1e-8


@dataclass(kw_only=True)
class GXPO:
    """Defaults are the authors' late code, but for the gate's signal, which is the paper's.

    The paper: lookahead 3, 5 or 10, ratio coord_grad, opt_state keep, gate_stat ema, gate_threshold 0.5, gate_warmup 0,
    gate_patience 1, active_threshold 0 (then 1e-8 for all coordinates). Where the guard refuses a probe, or a gradient
    is zero, the update ends as the plain step from the anchor that it has begun with; where it refuses the corrective
    step, that plain step is taken anew (with opt_state=keep by moments that have seen the probes).
    """

    lookahead: int = setting(5, "[2, 1e4]")  # K, virtual steps; the cost does not depend on it
    alpha: float = setting(0.5, "(0, 1]")  # how far of the way to theta_K
    # per coordinate of steps or of gradients, or one per tensor
    ratio: Literal["coord_adamw", "coord_grad", "tensor"] = "coord_adamw"
    ratio_min: float = setting(-2.0, "[-inf, inf]")  # lower limit of r
    ratio_max: float = setting(3.0, "[-inf, inf]")  # upper limit of r
    scale_max: float | None = setting(None, "(0, inf]")  # None: lookahead / 2 + 1
    # times the tensor's root mean square; smaller coordinates are not extrapolated
    active_threshold: float = setting(1e-3, "[0, 1e6]")
    opt_state: Literal["restore", "keep"] = "restore"  # whether the probes leave the optimizer's state as it was
    gate: Literal["grad_norm", "entropy", "cosine", "off"] = "grad_norm"  # of the corrective gradient, before clipping
    gate_threshold: float | None = setting(None, "[-1e6, 1e6]")  # None: z of 3, or 1 - |cosine| of 0.15
    gate_window: int = setting(30, "[2, 1e6]")  # values that a new one is compared with
    gate_warmup: int = setting(50, "[0, 1e9]")  # values that the gate leaves out at first
    gate_patience: int = setting(3, "[1, 1e6]")  # values over the threshold in a row that close the gate
    gate_stat: Literal["window", "ema", "mad"] = "window"  # what the threshold is compared with
    fallback_steps: int = setting(0, "[0, 1e9]")  # steps of the single rule after the gate has closed; 0 = for good
    # mean of alpha scale below which the probes are taken back
    min_effective_multiplier: float = setting(0.0, "[0, 1e6]")

    stopped: bool = field(default=False, init=False)
    resting: int = field(default=0, init=False)  # steps until the gate opens again
    watch: Gate = field(init=False, repr=False)

    def __post_init__(self):
        check_bounds(self, "update.")
        if not self.ratio_min < self.ratio_max:
            raise ValueError(f"--update.ratio-min {self.ratio_min} must be below --update.ratio-max {self.ratio_max}")
        self.watch = Gate(
            window=self.gate_window, threshold=THRESHOLDS[self.gate] if self.gate_threshold is None else
            self.gate_threshold, stat="level" if self.gate == "cosine" else self.gate_stat, warmup=self.gate_warmup,
            patience=self.gate_patience,
        )  # fmt: skip

    @property
    def copies(self) -> int:
        return 3 if self.gate == "cosine" else 2

    @property
    def holds_state(self) -> bool:
        return self.opt_state == "restore"

    @property
    def per_coordinate(self) -> bool:
        return self.ratio != "tensor"

    @property
    def active(self) -> bool:
        return not self.stopped and self.resting == 0

    @property
    def backward_passes(self) -> int:
        return 3 if self.active else 1

    def update(self, policy, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for accumulate in minibatches:
            metrics = self.extrapolated_step(policy, accumulate) if self.active else plain_step(policy, accumulate)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
        self.resting = max(0, self.resting - 1)
        summed = ("skipped", "num_backward_passes", "update/fallback")
        means = {name: value if name in summed else value / len(minibatches) for name, value in totals.items()}
        return means | {"update/gate_z": self.watch.z, "update/stopped": float(not self.active)}

    def extrapolated_step(self, policy, accumulate: Accumulate) -> dict[str, float]:
        anchor = policy.values()
        state = policy.optimizer_snapshot() if self.opt_state == "restore" else None
        metrics = accumulate()
        first = policy.gradient()
        metrics |= policy.apply(first)
        if not taken(metrics):
            return metrics | {"num_backward_passes": 1.0, "update/fallback": 1.0}
        # after `apply`, so that r sees both gradients as they were clipped
        probe = policy.values().sub_(anchor) if self.ratio == "coord_adamw" else first.shard.clone()
        g0 = first.shard.clone() if self.gate == "cosine" else None
        metrics = accumulate()
        second = policy.gradient()
        metrics |= policy.apply(second)
        if not taken(metrics):
            return metrics | {"num_backward_passes": 2.0, "update/fallback": 1.0}
        report = self.reposition(policy, anchor, probe, second.shard)
        policy.publish(written=policy.weights_bf16 is not None)
        if state is not None:
            policy.optimizer_restore(state)
        metrics = accumulate()
        slow = policy.gradient()
        signal = self.signal(policy, metrics, slow, g0)
        metrics |= policy.apply(slow) | report
        if not taken(metrics):
            policy.assign(anchor)
            policy.publish()
            skipped = metrics["skipped"] + plain_step(policy, accumulate)["skipped"]
            return metrics | {"skipped": skipped, "num_backward_passes": 4.0, "update/fallback": 1.0}
        self.after(signal)
        return metrics | {"num_backward_passes": 3.0, "update/fallback": 0.0}

    def reposition(self, policy, anchor: Tensor, probe: Tensor, g1: Tensor) -> dict[str, float]:
        """Move policy.master, and bfloat16 weights, from theta_2 to theta~; metrics of the move, over all ranks."""
        theta, low, weights = policy.master, policy.low, policy.weights_bf16
        lr, decay = policy.lr, policy.optim.weight_decay
        if self.ratio == "tensor":
            sums = self.reposition_by_tensor(policy, anchor, probe, g1)
        else:
            adamw = self.ratio == "coord_adamw"
            rms = policy.tensor_rms(lambda s: direction(anchor[s], probe[s], lr, decay) if adamw else probe[s])
            threshold = self.active_threshold * rms if self.active_threshold else None
            segment = segments(policy.tensor_slices(), theta) if self.active_threshold else None
            sums = extrapolate_(
                theta, anchor, self.lookahead, self.alpha, grads=None if adamw else (probe, g1),
                u0=probe if adamw else None, lr=lr, weight_decay=decay, ratio_min=self.ratio_min,
                ratio_max=self.ratio_max, scale_max=self.scale_max, threshold=threshold, segment=segment,
                low=low, out_bf16=weights,
            ).sums  # fmt: skip
        stats = FlatStats(policy.all_sum(sums)).named()
        multiplier = self.alpha * stats["scale"] / stats["elements"]
        refused = multiplier < self.min_effective_multiplier
        if refused:
            interpolate_(theta, anchor, 0.0, low=low, out_bf16=weights)
        active = max(1.0, stats["active"])
        return {
            "update/multiplier": multiplier,
            "update/ratio": stats["ratio"] / active,
            "update/ratio_clipped_frac": stats["clamped"] / active,
            "update/active_frac": stats["active"] / stats["elements"],
            "update/stretch": math.sqrt(stats["after_sq"] / max(stats["before_sq"], 1e-300)),
            "update/refused": float(refused),
        }

    def reposition_by_tensor(self, policy, anchor: Tensor, g0: Tensor, g1: Tensor) -> Tensor:
        """One ratio per tensor, <g0, g1> / <g0, g0>, clamped to [-1, 1.5]; returns the sums of FlatStats."""
        slices = policy.tensor_slices()
        products = [torch.stack([(g0[s] * g1[s]).sum(), g0[s].square().sum()]).double() for s in slices]
        inner, square = policy.all_sum(torch.stack(products)).unbind(dim=1)
        ratio = (inner / (square + 1e-300)).clamp(-1.0, 1.5)
        largest = self.lookahead / 2 + 1 if self.scale_max is None else self.scale_max
        scale = torch.where((ratio + 1).abs() > TINY, series(ratio, self.lookahead), 1.0).clamp(1.0, largest)
        low, weights = policy.low, policy.weights_bf16
        total = torch.zeros(len(FlatStats.NAMES), dtype=torch.float64, device=g0.device)
        for part, own, r in zip(slices, scale.tolist(), ratio.tolist(), strict=True):
            halves = {name: half[part] for name, half in (("low", low), ("out_bf16", weights)) if half is not None}
            moved = interpolate_(policy.master[part], anchor[part], self.alpha * own, **halves).sums
            n = part.stop - part.start
            extra = {"active": n, "ratio": n * r, "ratio_sq": n * r * r, "scale": n * own}
            total += moved + moved.new_tensor([extra.get(name, 0.0) for name in FlatStats.NAMES])
        return total

    def signal(self, policy, metrics: dict[str, float], slow, g0: Tensor | None) -> float:
        """What the gate watches, from the corrective gradient."""
        if g0 is None:
            return slow.norm if self.gate == "grad_norm" else metrics["entropy"]
        products = torch.stack([(g0 * slow.shard).sum(), g0.square().sum(), slow.shard.square().sum()]).double()
        inner, one, other = policy.all_sum(products).tolist()
        return 1 - abs(inner) / math.sqrt(max(one * other, 1e-300))

    def after(self, signal: float) -> None:
        """Let the gate see a corrective gradient, and close."""
        if self.gate != "off" and self.watch.observe(signal):
            self.stopped = self.fallback_steps == 0
            # the step in which it closes counts one down itself
            self.resting = self.fallback_steps + 1 if self.fallback_steps else 0
            if self.fallback_steps:
                self.watch.reset()

    def state_dict(self) -> dict:
        return {"stopped": self.stopped, "resting": self.resting, "watch": self.watch.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.stopped, self.resting = state["stopped"], state["resting"]
        self.watch.load_state_dict(state["watch"])


def taken(metrics: dict[str, float]) -> bool:
    """Whether an optimizer step was, by what `policy.apply` returned."""
    return not metrics["skipped"] and metrics["grad_norm"] > 0


def plain_step(policy, accumulate: Accumulate) -> dict[str, float]:
    return {**accumulate(), **policy.optimizer_step(), "num_backward_passes": 1.0}


def segments(slices: list[slice], shard: Tensor) -> Tensor:
    """[blocks] int64: which tensor each block of a shard belongs to; padding belongs to the tensor before."""
    index = torch.zeros(-(-len(shard) // BLOCK), dtype=torch.int64, device=shard.device)
    for number, part in enumerate(slices):
        if part.stop > part.start:
            index[part.start // BLOCK :] = number
    return index
