"""When to stop looking ahead: a z-score of a signal against its own recent past, remembered across steps."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class Gate:
    """z = (value - center) / spread of the window; the gate trips after `patience` values in a row with z >= threshold.

    stat window: mean and population std; mad: median and 1.4826 times the median absolute deviation, at least a tenth
    of the median; ema: exponential mean and std of weight 0.1 that start at 1 (GXPO's first code, which skips two
    values); level: the value itself. The window holds the values before the tested one, or ends with it (`inclusive`,
    as SFPO's code has it: then z <= sqrt(window - 1)). The first `warmup` values are seen and forgotten. While a streak
    is open its values stay out of the window.
    """

    window: int
    threshold: float
    stat: Literal["window", "mad", "ema", "level"] = "window"
    warmup: int = 0
    patience: int = 1
    two_sided: bool = False
    inclusive: bool = False

    values: list[float] = field(default_factory=list, init=False)
    seen: int = field(default=0, init=False)
    streak: int = field(default=0, init=False)
    ema: tuple[float, float] = field(default=(1.0, 1.0), init=False)  # mean, std
    z: float = field(default=0.0, init=False)  # of the last value

    def observe(self, value: float) -> bool:
        """Take in the value of a step; whether the gate trips."""
        self.seen += 1
        if not math.isfinite(value) or self.seen <= self.warmup:
            return False
        if self.inclusive:
            self.remember(value)
        score = self.score(value)
        self.z = 0.0 if score is None else score
        over = score is not None and (abs(score) if self.two_sided else score) >= self.threshold
        self.streak = self.streak + 1 if over else 0
        if not self.inclusive and not over:
            self.remember(value)
        return self.streak >= self.patience

    def score(self, value: float) -> float | None:
        """z of the value, or None as long as there is too little to compare with."""
        if self.stat == "level":
            return value
        if self.stat == "ema":
            mean, std = self.ema
            return (value - mean) / (std + 1e-8) if self.seen - self.warmup > 2 else None
        if len(self.values) < self.window:
            return None
        if self.stat == "mad":
            center = statistics.median(self.values)
            deviation = statistics.median(abs(v - center) for v in self.values)
            return (value - center) / max(1.4826 * deviation, 0.1 * abs(center), 1e-9)
        return (value - statistics.fmean(self.values)) / (statistics.pstdev(self.values) + 1e-9)

    def remember(self, value: float) -> None:
        if self.stat == "ema":
            mean, std = self.ema
            self.ema = (0.9 * mean + 0.1 * value, max(0.01, math.sqrt(0.9 * std**2 + 0.1 * (value - mean) ** 2)))
        elif self.stat != "level":
            self.values = [*self.values, value][-self.window :]

    def reset(self) -> None:
        """Forget everything, as after a pause."""
        self.values, self.seen, self.streak, self.ema, self.z = [], 0, 0, (1.0, 1.0), 0.0

    def state_dict(self) -> dict:
        return {"values": self.values, "seen": self.seen, "streak": self.streak, "ema": list(self.ema), "z": self.z}

    def load_state_dict(self, state: dict) -> None:
        self.values, self.seen, self.streak = list(state["values"]), state["seen"], state["streak"]
        self.ema, self.z = tuple(state["ema"]), state["z"]
