"""The critic: what reward to expect before each token of a completion, learned beside the policy."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastrl.base import ranks
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import TrainBatch
from fastrl.models.head import label_hidden
from fastrl.models.inputs import Inputs, inputs_of, upload
from fastrl.models.loading import LoadedModel
from fastrl.updates.base import Accumulate
from fastrl.updates.single import Single
from fastrl.weights.guard import Guard
from fastrl.weights.optim import OptimConfig
from fastrl.weights.shard import MasterKind, Offload, ShardedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ValueLoss = Callable[[Tensor, TrainBatch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """Used by objectives with values per token; its own optimizer, schedule and gradient clip."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    passes: int = setting(1, "[1, 1e4]")  # over a step's completions, before the policy moves

    def __post_init__(self):
        check_bounds(self, "critic.")


class ValueModel(nn.Module):
    """A causal language model with one number per position in place of its LM head.

    The head starts at zero, so before the first update every value is 0 and advantages are rewards: a random head would
    instead start with values of the size of the hidden states, which differs from model to model.
    """

    def __init__(self, model: "PreTrainedModel"):
        super().__init__()
        self.base_model = model.base_model
        like = next(model.parameters())
        hidden = model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden, 1, dtype=like.dtype, device=like.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] -> values [N], float32 or better: they are small differences of rewards."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        head = self.value_head
        return linear(hidden.to(dtype), head.weight.to(dtype), head.bias.to(dtype))[:, 0]


class Critic(ShardedModel):
    """A model of its own: weights, gradients, optimizer state and guard are apart from the policy's."""

    model: ValueModel

    def __init__(
        self,
        loaded: LoadedModel,
        config: CriticConfig,
        grad_dtype: torch.dtype = torch.float32,
        *,
        offload: Offload = "none",
        master: MasterKind = "float32",
        spike_sigma: float = Guard.spike_sigma,
    ):
        guard = Guard(lr_setting="--critic.optim.lr", spike_sigma=spike_sigma)
        super().__init__(ValueModel(loaded.model), config.optim, guard, grad_dtype, master=master, offload=offload)
        self.packs, self.rule = loaded.packs, Single(epochs_per_batch=config.passes)

    def score(self, batch: TrainBatch) -> Tensor:
        """Values of a microbatch, [B, S], differentiable, zero outside the response mask.

        Column s is the value of the text before token s, read off where that token is predicted: label-aligned.
        """
        return self.values(upload(inputs_of(batch, self.packs), self.device))

    def values(self, inputs: Inputs) -> Tensor:
        with self.saving():
            hidden = label_hidden(self.model, inputs)
        return inputs.spread(self.model(hidden))

    def backward(self, pieces: Iterable[TrainBatch], loss_sum: ValueLoss, tokens: float) -> dict[str, Tensor]:
        """Leave the gradient of a minibatch, cut into microbatches, in the gradient buffer -> sums of its metrics.

        tokens: response tokens of the minibatch over all ranks, which the summed loss is divided by.
        """
        self.zero_grad()
        sums: dict[str, Tensor] = {}
        for piece in pieces:
            inputs, part = upload((inputs_of(piece, self.packs), piece), self.device)
            loss, metrics = loss_sum(self.values(inputs), part)
            (loss / tokens).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        return sums

    def fit(self, minibatches: Sequence[Accumulate]) -> dict[str, float]:
        """One optimizer step per minibatch, `passes` times over them -> value_loss, critic/grad_norm, critic/..."""
        metrics = self.rule.update(self, minibatches)
        del metrics["num_backward_passes"]  # those that are counted are the policy's
        return {"value_loss": metrics.pop("loss"), **{f"critic/{name}": value for name, value in metrics.items()}}


def explained_variance(batch: TrainBatch) -> float:
    """1 - Var(returns - values) / Var(returns) over the response tokens of all ranks; NaN when returns do not vary.

    1: the critic knows every return; 0: it knows no more than their mean; below 0: it is worse than a constant.
    """
    assert batch.returns is not None and batch.values is not None  # Objective.prepare
    returns = batch.returns[batch.response_mask].double()
    errors = returns - batch.values[batch.response_mask].double()
    moments = torch.stack([x.sum() for x in (torch.ones_like(returns), returns, returns**2, errors, errors**2)])
    n, r, rr, e, ee = ranks.all_sum_(moments).tolist()
    variance = rr - r * r / max(n, 1)
    # equal returns leave a rounding error
    return 1 - (ee - e * e / n) / variance if variance > 1e-12 * rr else math.nan
