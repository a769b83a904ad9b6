"""GXPO (arXiv:2605.06755): two probe steps, an extrapolation per coordinate, one corrective step; per minibatch.

    1  theta_1 = step(theta_0, g0),  theta_2 = step(theta_1, g1)
    2  r = second / first of the gradients (or of AdamW's directions),   scale = S_K(r) / S_2(r)    as weights/moves.py
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

from torch import Tensor

from fastrl.base.setting import check_bounds, setting
from fastrl.updates.base import Accumulate, Shard, UpdateRule
from fastrl.updates.gate import Gate
from fastrl.weights.moves import Extrapolation
from fastrl.weights.shard import Gradient

THRESHOLDS = {"grad_norm": 3.0, "entropy": 3.0, "cosine": 0.15, "off": 1.0}


@dataclass(kw_only=True)
class GXPO(UpdateRule):
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
            window=self.gate_window,
            threshold=THRESHOLDS[self.gate] if self.gate_threshold is None else self.gate_threshold,
            stat="level" if self.gate == "cosine" else self.gate_stat,
            warmup=self.gate_warmup,
            patience=self.gate_patience,
        )

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

    @property
    def law(self) -> Extrapolation:
        return Extrapolation(
            lookahead=self.lookahead,
            alpha=self.alpha,
            ratio_min=self.ratio_min,
            ratio_max=self.ratio_max,
            scale_max=self.scale_max,
            active_threshold=self.active_threshold,
            min_multiplier=self.min_effective_multiplier,
        )

    def update(self, shard: Shard, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for accumulate in minibatches:
            metrics = self.extrapolated_step(shard, accumulate) if self.active else plain_step(shard, accumulate)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value
        self.resting = max(0, self.resting - 1)
        summed = ("skipped", "num_backward_passes", "update/fallback")
        means = {name: value if name in summed else value / len(minibatches) for name, value in totals.items()}
        return means | {"update/gate_z": self.watch.z, "update/stopped": float(not self.active)}

    def extrapolated_step(self, shard: Shard, accumulate: Accumulate) -> dict[str, float]:
        anchor = shard.snapshot()
        state = shard.optimizer_snapshot() if self.opt_state == "restore" else None
        metrics = accumulate()
        first = shard.gradient(metrics["loss"])
        metrics |= shard.apply(first)
        if not taken(metrics):
            return metrics | {"num_backward_passes": 1.0, "update/fallback": 1.0}
        # after `apply`, so that r sees both gradients as they were clipped
        probe = shard.snapshot().sub_(anchor) if self.ratio == "coord_adamw" else first.shard.clone()
        g0 = first.shard.clone() if self.gate == "cosine" else None
        metrics = accumulate()
        second = shard.gradient(metrics["loss"])
        metrics |= shard.apply(second)
        if not taken(metrics):
            return metrics | {"num_backward_passes": 2.0, "update/fallback": 1.0}
        report = self.reposition(shard, anchor, probe, second.shard)
        if state is not None:
            shard.optimizer_restore(state)
        metrics = accumulate()
        slow = shard.gradient(metrics["loss"])
        signal = self.signal(shard, metrics, slow, g0)
        metrics |= shard.apply(slow) | report
        if not taken(metrics):
            shard.restore(anchor)
            skipped = metrics["skipped"] + plain_step(shard, accumulate)["skipped"]
            return metrics | {"skipped": skipped, "num_backward_passes": 4.0, "update/fallback": 1.0}
        self.after(signal)
        return metrics | {"num_backward_passes": 3.0, "update/fallback": 0.0}

    def reposition(self, shard: Shard, anchor: Tensor, probe: Tensor, g1: Tensor) -> dict[str, float]:
        """From theta_2 to theta~; metrics of the move."""
        if self.ratio == "tensor":
            stats = shard.extrapolate_by_tensor(anchor, self.law, (probe, g1))
        elif self.ratio == "coord_grad":
            stats = shard.extrapolate(anchor, self.law, grads=(probe, g1))
        else:
            stats = shard.extrapolate(anchor, self.law, u0=probe)
        active = max(1.0, stats["active"])
        return {
            "update/multiplier": self.law.multiplier(stats),
            "update/ratio": stats["ratio"] / active,
            "update/ratio_clipped_frac": stats["clamped"] / active,
            "update/active_frac": stats["active"] / stats["elements"],
            "update/stretch": math.sqrt(stats["after_sq"] / max(stats["before_sq"], 1e-300)),
            "update/refused": stats["refused"],
        }

    def signal(self, shard: Shard, metrics: dict[str, float], slow: Gradient, g0: Tensor | None) -> float:
        """What the gate watches, from the corrective gradient."""
        if g0 is None:
            return slow.norm if self.gate == "grad_norm" else metrics["entropy"]
        inner, one, other = shard.inner_products([(g0, slow.shard), (g0, g0), (slow.shard, slow.shard)])
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
    """Whether an optimizer step was, by what `Shard.apply` returned."""
    return not metrics["skipped"] and metrics["grad_norm"] > 0


def plain_step(shard: Shard, accumulate: Accumulate) -> dict[str, float]:
    metrics = accumulate()
    return {**metrics, **shard.optimizer_step(metrics["loss"]), "num_backward_passes": 1.0}
