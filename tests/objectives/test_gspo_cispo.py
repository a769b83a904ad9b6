"""GSPO, CISPO and the correction for what the engine sampled from, as settings of GRPO, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from fastrl.objectives.grpo import GRPO
from support.batches import loss_and_grad, make


def test_gspo_clips_whole_completions():
    # means of the log-ratios: (0.3 - 0.1) / 2 = 0.1 and -0.2; ratios 1.10517 and 0.81873
    ratios = [[0.0, 0.3, -0.1], [0.0, -0.2, 0.0]]
    gspo = GRPO(ratio_level="sequence", loss_agg="seq", clip_low=0.3, clip_high=0.3, dual_clip=None)
    loss, grad, metrics = loss_and_grad(gspo, make([2, 1], [1.0, -1.0]), ratios)
    assert loss == pytest.approx(-math.exp(0.1) + math.exp(-0.2), rel=1e-5)
    # each token of a completion: -A s / T
    assert grad[0, 1:].tolist() == pytest.approx([-math.exp(0.1) / 2] * 2, rel=1e-5)
    assert grad[1].tolist() == pytest.approx([0.0, math.exp(-0.2), 0.0], rel=1e-5)
    assert metrics["clip_ratio/region_mean"] == 0
    narrow = GRPO(ratio_level="sequence", loss_agg="seq", clip_low=0.05, clip_high=0.05, dual_clip=None)
    loss, grad, metrics = loss_and_grad(narrow, make([2, 1], [1.0, -1.0]), ratios)
    assert loss == pytest.approx(-1.05 + 0.95, rel=1e-4) and not grad.any()
    assert metrics["clip_ratio/high_mean"] == 2 and metrics["clip_ratio/low_mean"] == 1  # all tokens of the completion


def test_gspo_on_the_first_step_is_grpo():
    batch = make([2, 1, 3], [1.0, -0.5, 0.25])
    plain = loss_and_grad(GRPO(loss_agg="seq"), batch)
    sequence = loss_and_grad(GRPO(loss_agg="seq", ratio_level="sequence"), batch)
    assert sequence[0] == pytest.approx(plain[0]) and torch.allclose(sequence[1], plain[1])


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    # ratios e^0.5 = 1.6487 -> 1.2 and e^-3 = 0.0498, which a lower bound of 1 - 10 leaves alone
    cispo = GRPO(surrogate="cispo", clip_low=10.0, clip_high=0.2)
    loss, grad, metrics = loss_and_grad(cispo, make([2], [2.0]), [[0.0, 0.5, -3.0]])
    assert grad[0].tolist() == pytest.approx([0.0, -2 * 1.2, -2 * math.exp(-3)], rel=1e-5)
    # logprobs are -1 + 0.5 and -1 - 3
    assert loss == pytest.approx(-2 * 1.2 * -0.5 - 2 * math.exp(-3) * -4.0, rel=1e-5)
    assert metrics["clip_ratio/high_mean"] == 1 and metrics["clip_ratio/low_mean"] == 0
    # the ordinary surrogate has none there
    _, grad, _ = loss_and_grad(GRPO(), make([2], [2.0]), [[0.0, 0.5, -3.0]])
    assert grad[0, 1] == 0
    # on both sides of the ratio, for good and bad completions
    _, grad, metrics = loss_and_grad(GRPO(surrogate="cispo"), make([1, 1], [1.0, -1.0]), [[0.0, -1.0], [0.0, 1.0]])
    assert grad[:, 1].tolist() == pytest.approx([-0.8, 1.2]) and metrics["clip_ratio/region_mean"] == 2


# old - rollout per token: ln 2 and ln 8 in the first completion (together ln 16), ln 0.5 in the second
@pytest.mark.parametrize(
    "kind, weights",
    [
        ("tis", [[2.0, 3.0], [0.5]]),
        ("mis", [[2.0, 0.0], [0.5]]),
        ("mask", [[1.0, 0.0], [1.0]]),
        ("seq-mask", [[0.0, 0.0], [0.5]]),
    ],
)
def test_correction_for_the_engines_distribution(kind, weights):
    objective = GRPO(is_correction=kind, is_cap=3.0)
    batch = make([2, 1], [1.0, 1.0])
    rollout = torch.tensor([[0.0, -1 - math.log(2), -1 - math.log(8)], [0.0, -1 - math.log(0.5), math.nan]])
    old = torch.where(batch.response_mask, -1.0, math.nan)
    batch = replace(batch, rollout_logprobs=rollout, old_logprobs=old)
    _, grad, _ = loss_and_grad(objective, batch, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert grad[0, 1:].tolist() == pytest.approx([-w for w in weights[0]])
    assert grad[1, 1].item() == pytest.approx(-weights[1][0])
    if kind == "mask":  # on the other side too
        weight = GRPO(is_correction="mask", is_cap=1.9).sampler_weight(batch)
        assert weight[0, 1:].tolist() == [0.0, 0.0] and weight[1, 1] == 0
    assert objective.needs(1) == {"old_logprobs"} and GRPO().needs(1) == frozenset()
