"""A float32 vector in two halves: every bit comes back, and the upper half is the nearest bfloat16."""

import pytest
import torch

from fastrl.weights.halves import join, split

# bits of theta, of the upper half, and the lower one
BY_HAND = {
    "exact": (0x3F800000, 0x3F80, 0),
    "below a tie": (0x3F807FFF, 0x3F80, 0x7FFF),
    "tie, away from zero": (0x3F808000, 0x3F81, -0x8000),
    "tie above an odd value": (0x3F818000, 0x3F82, -0x8000),
    "negative tie": (0xBF808000, 0xBF81, -0x8000),
    "above a tie": (0x3F808001, 0x3F81, -0x7FFF),
    "up into the next power": (0x3FFFFFFF, 0x4000, -1),
    "largest": (0x7F7FFFFF, 0x7F80, -1),
    "largest negative": (0xFF7FFFFF, 0xFF80, -1),
    "zero": (0, 0, 0),
    "minus zero": (0x80000000, 0x8000, 0),
    "smallest": (1, 0, 1),
    "smallest negative": (0x80000001, 0x8000, 1),
    "denormal": (0x0000C000, 1, -0x4000),
    "infinity": (0x7F800000, 0x7F80, 0),
    "minus infinity": (0xFF800000, 0xFF80, 0),
}
NANS = {0x7F800001: 0x7FC0, 0x7FC00000: 0x7FC0, 0x7FFFFFFF: 0x7FC0, 0xFF800001: 0xFFC0, 0xFFFFFFFF: 0xFFC0}


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) else bits


def floats(*bits: int) -> torch.Tensor:
    return torch.tensor([signed(b, 32) for b in bits], dtype=torch.int32).view(torch.float32)


def same_bits(a, b) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", BY_HAND)
def test_halves_by_hand(name):
    bits, upper, lower = BY_HAND[name]
    high, low = split(floats(bits))
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert (high.view(torch.int16).item(), low.item()) == (signed(upper, 16), lower)
    assert same_bits(join(high, low), floats(bits))


def test_nan_stays_nan_of_its_sign():
    high, low = split(floats(*NANS))
    assert high.view(torch.int16).tolist() == [signed(h, 16) for h in NANS.values()] and not low.any()
    assert join(high, low).isnan().all()


@pytest.mark.parametrize("upper", [0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x8000, 0xBF7F, 0xFF7F])
def test_every_lower_half_comes_back_and_the_upper_one_is_nearest(upper):
    theta = (torch.arange(1 << 16, dtype=torch.int64) + signed(upper << 16, 32)).int().view(torch.float32)
    high, low = split(theta)
    assert same_bits(join(high, low), theta)
    even = theta.bfloat16()
    ties = torch.arange(1 << 16) == 0x8000
    assert torch.equal(high[~ties], even[~ties])
    # at the tie, the neighbour of the larger magnitude
    assert high[ties].view(torch.int16).item() == signed(upper + 1, 16)


def test_values_of_training_come_back():
    theta = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.02
    high, low = split(theta)
    assert same_bits(join(high, low), theta)
    # half a unit in the last of 8 bits
    assert ((high.double() - theta.double()).abs() <= 2**-9 * 2.0 ** theta.abs().log2().ceil()).all()
    assert low.min() < -30_000 and low.max() > 30_000


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="only float32 is split, got torch.float64"):
        split(torch.zeros(3, dtype=torch.float64))
    high, low = split(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got torch.bfloat16 \(3,\) and torch.int16 \(2,\)"):
        join(high, low[:2])
    with pytest.raises(ValueError, match="got torch.float16"):
        join(high.half(), low)
