"""When the gates trip: by hand, and on the signals they were made for."""

import statistics

import numpy
import pytest

from fastrl.updates.gate import Gate
from support.toys import FLAT_SIGNAL


def trips(gate, values):
    """Index of the value at which the gate trips, or None."""
    for i, value in enumerate(values):
        if gate.observe(value):
            return i
    return None


def test_z_by_hand():
    gate = Gate(window=30, threshold=3.0)
    assert trips(gate, FLAT_SIGNAL) is None and gate.z == 0.0  # nothing to compare with before the window is full
    assert not gate.observe(4.5) and gate.z == pytest.approx(2.5)
    # the oldest 1.0 has left for 4.5: mean (60 - 1 + 4.5) / 30, mean of squares (150 - 1 + 20.25) / 30
    mean = 63.5 / 30
    std = (169.25 / 30 - mean**2) ** 0.5
    assert gate.observe(6.0) and gate.z == pytest.approx((6.0 - mean) / std)


def test_a_gate_that_looks_up_ignores_a_fall():
    assert trips(Gate(window=30, threshold=1.0), [*FLAT_SIGNAL, -9.0]) is None
    assert trips(Gate(window=30, threshold=1.0, two_sided=True), [*FLAT_SIGNAL, -9.0]) == 30
    assert trips(Gate(window=30, threshold=1.0), [*FLAT_SIGNAL, 9.0]) == 30


def test_never_before_the_window_is_full_or_in_the_warmup():
    assert trips(Gate(window=30, threshold=1.0), [1.0, 3.0] * 14 + [100.0]) is None
    # the warm-up is forgotten: its values are not in the window, which then has to fill
    gate = Gate(window=4, threshold=3.0, warmup=10)
    assert trips(gate, [50.0] * 10 + [1.0, 3.0, 1.0, 3.0]) is None
    assert gate.observe(9.0)
    assert trips(Gate(window=4, threshold=3.0, warmup=10), [50.0] * 10 + [1.0, 3.0, 1.0, 400.0]) is None


def test_patience_counts_in_a_row_against_a_frozen_window():
    gate = Gate(window=30, threshold=3.0, patience=3)
    assert trips(gate, [*FLAT_SIGNAL, 9.0, 9.0, 2.0, 9.0, 9.0]) is None  # the 2.0 ends the streak
    assert gate.streak == 2 and 9.0 not in gate.values
    assert gate.observe(9.0)


def test_inclusive_window_holds_the_tested_value():
    # one spike in a window of w: z = sqrt(w - 1)
    gate = Gate(window=30, threshold=6.0, inclusive=True)
    assert trips(gate, [0.0] * 29 + [1.0]) is None
    assert gate.z == pytest.approx(29**0.5)


def test_median_and_deviation_by_hand():
    # median 10, absolute deviations 0, 0, 1, 1, 2 -> 1 -> 1.4826; with one outlier in the window still 1
    gate = Gate(window=5, threshold=2.0, stat="mad")
    trips(gate, [10.0, 10.0, 9.0, 11.0, 12.0])
    assert not gate.observe(12.9) and gate.z == pytest.approx(2.9 / 1.4826)
    gate = Gate(window=5, threshold=2.0, stat="mad")
    trips(gate, [10.0] * 5)
    assert not gate.observe(11.9) and gate.z == pytest.approx(1.9)  # at least a tenth of the median


def noisy(level, seed, num=300):
    return level * (1 + 0.2 * numpy.random.default_rng(seed).standard_normal(num))


def test_exponential_gate_on_a_quiet_norm():
    # norms of 0.0177 with 20 % noise fall from the start at (1, 1); the spread follows, and near step 98 noise trips it
    steps = [trips(Gate(window=30, threshold=0.5, stat="ema"), noisy(0.0177, seed)) for seed in range(200)]
    assert 80 < statistics.median(s for s in steps if s is not None) < 120
    # in both directions it would trip at the first value that it tests
    assert trips(Gate(window=30, threshold=0.5, stat="ema", two_sided=True), noisy(0.0177, 0)) == 2


def test_entropy_gate_of_the_authors_code():
    def entropies(seed, slope):
        generator = numpy.random.default_rng(seed)
        return 0.35 + slope * numpy.arange(400) + 0.01 * generator.standard_normal(400)

    def code():
        return Gate(window=30, threshold=1.0, inclusive=True)

    still = [trips(code(), entropies(seed, 0.0)) for seed in range(200)]
    assert 29 <= statistics.median(s for s in still if s is not None) <= 37
    falling = [trips(code(), entropies(seed, -0.002)) for seed in range(200)]
    assert sum(s is not None for s in falling) < 10


@pytest.mark.parametrize("stat", ["window", "mad", "ema", "level"])
def test_a_resumed_gate_goes_on(stat):
    options = dict(window=8, threshold=1.3, stat=stat, patience=2, warmup=3)
    values = noisy(1.0, 7, 120)
    one = Gate(**options)
    for value in values[:20]:
        one.observe(value)
    other = Gate(**options)
    other.load_state_dict(one.state_dict())
    for value in values[20:]:
        assert one.observe(value) == other.observe(value)
        assert one.state_dict() == other.state_dict()


def test_values_that_are_not_finite_are_not_learned_from():
    gate = Gate(window=30, threshold=1.0)
    assert trips(gate, [*FLAT_SIGNAL, float("nan"), float("inf")]) is None
    assert gate.values == FLAT_SIGNAL
