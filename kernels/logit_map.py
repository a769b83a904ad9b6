"""What a model does to its logits after the LM head."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitMap:
    """f(z) = softcap tanh(scale z / softcap); without a softcap (0) it is scale z.

    Granite divides its logits by 8: LogitMap(scale=1/8). Gemma 2 bounds them by 30: LogitMap(softcap=30.0).
    The sampling temperature divides f(z), not z.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def __post_init__(self):
        if not (0 < self.scale < float("inf") and 0 <= self.softcap < float("inf")):
            raise ValueError(f"LogitMap: scale must be above 0, softcap at least 0, both finite; got {self}")

    @property
    def inner(self) -> float:
        """What z is multiplied by inside of tanh."""
        return self.scale / self.softcap

    def __call__(self, z: Tensor) -> Tensor:
        """Logits of any shape -> those of the model, a new tensor or z itself."""
        if self.softcap:
            return (z * self.inner).tanh() * self.softcap
        return z if self.scale == 1.0 else z * self.scale

    def over(self, z: Tensor) -> Tensor:
        """As a call, over z."""
        if self.softcap:
            return z.mul_(self.inner).tanh_().mul_(self.softcap)
        return z if self.scale == 1.0 else z.mul_(self.scale)

    def slope(self, mapped: Tensor) -> float | Tensor:
        """f'(z) from f(z): scale (1 - (f(z) / softcap)^2); a number without a softcap."""
        if self.softcap:
            return mapped.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)
        return self.scale


PLAIN = LogitMap()
