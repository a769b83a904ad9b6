"""SFPO (arXiv:2510.04072): fast passes, a pull back towards the anchor, one slow pass; one batch of rollouts for all.

    I    theta_{k+1} = theta_k - step(grad L(theta_k)),  k = 0 .. K-1    whole passes over the minibatches
    II   theta~      = theta_0 + alpha (theta_K - theta_0)
    III  theta'      = theta~ - step(grad L(theta~))

Under plain gradient descent theta' = theta_0 - lr (alpha sum_k grad L(theta_k) + grad L(theta~)), eq. 12. K + 1
backward passes and 4 bytes per parameter for the anchor. Where the guard refuses all of pass III the weights are those
of the anchor again; other steps that it refuses are left out. The gate watches the entropy of pass III; once it trips,
alpha is 0 for good (or falls to 0) and the rule is `single` at its cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastrl.base.setting import check_bounds, setting
from fastrl.updates.base import Accumulate, Shard, UpdateRule, one_pass
from fastrl.updates.gate import Gate


@dataclass(kw_only=True)
class SFPO(UpdateRule):
    """The paper's runs: lookahead 3, alpha 0.8 (0.9 for Qwen3-4B), gate window 30 and threshold 1, AdamW state kept.

    gate `code` is the authors' program: z of the last entropy within the window that it ends, upward only. `paper` is
    their text: z of the new entropy against the window before it, in both directions.
    """

    lookahead: int = setting(3, "[1, 1e4]")  # K, fast passes
    alpha: float = setting(0.8, "[0, 1]")  # how far of the way to theta_K
    gate: Literal["code", "paper", "off"] = "code"  # the authors' program, their text, or none
    gate_window: int = setting(30, "[2, 1e6]")  # steps
    gate_threshold: float = setting(1.0, "(0, 1e6]")  # z
    # steps over which alpha falls to 0 once the gate has tripped; 0 = at once
    decay_steps: int = setting(0, "[0, 1e9]")
    opt_state: Literal["keep", "restore", "scale"] = "keep"  # moments at the pull back; scale: first one times alpha

    since: int | None = field(default=None, init=False)  # steps since the gate tripped
    watch: Gate = field(init=False, repr=False)

    def __post_init__(self):
        check_bounds(self, "update.")
        self.watch = Gate(
            window=self.gate_window,
            threshold=self.gate_threshold,
            two_sided=self.gate == "paper",
            inclusive=self.gate == "code",
        )

    copies = 1

    @property
    def holds_state(self) -> bool:
        return self.opt_state == "restore"

    @property
    def alpha_now(self) -> float:
        if self.since is None:
            return self.alpha
        return self.alpha * max(0.0, 1 - (self.since + 1) / (self.decay_steps + 1))

    @property
    def backward_passes(self) -> int:
        return self.lookahead + 1 if self.alpha_now > 0 else 1

    def update(self, shard: Shard, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        alpha, fast = self.alpha_now, []
        report = {"update/alpha": alpha}
        if alpha > 0:
            anchor = shard.snapshot()
            state = shard.optimizer_snapshot() if self.opt_state == "restore" else None
            fast = [one_pass(shard, minibatches) for _ in range(self.lookahead)]
            moved = shard.interpolate(anchor, alpha)
            if state is not None:
                shard.optimizer_restore(state)
            elif self.opt_state == "scale" and moved["before_sq"] > 0:
                shard.scale_first_moment(alpha)
            report["update/displacement"] = math.sqrt(moved["before_sq"])
        slow = one_pass(shard, minibatches)
        if alpha > 0 and slow["skipped"] == len(minibatches):
            shard.restore(anchor)  # the pulled back weights were no place to take a gradient at
        self.after(slow["entropy"])
        report |= {"update/gate_z": self.watch.z, "update/stopped": float(self.since is not None)}
        summed = {name: slow[name] + sum(p[name] for p in fast) for name in ("skipped", "num_backward_passes")}
        return slow | report | summed

    def after(self, entropy: float) -> None:
        """Let the gate see the step's entropy."""
        if self.since is not None:
            self.since += 1
        elif self.gate != "off" and self.watch.observe(entropy):
            self.since = 0

    def state_dict(self) -> dict:
        return {"since": self.since, "watch": self.watch.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.since = state["since"]
        self.watch.load_state_dict(state["watch"])
