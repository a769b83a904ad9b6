"""What the guard refuses, by hand: numbers that are not finite, spikes; when it gives up; and that it remembers."""

import json
import math
import random

import pytest

from fastrl.base.types import NumericsError
from fastrl.weights.guard import Guard
from support.run_folders import step_records
from support.trainers import make_trainer


def calm(guard: Guard, count: int = 64) -> Guard:
    """Norms of 1 and 3 in turn: mean 2, deviation 1, at most 3; losses of half that."""
    for n in range(count):
        value = 1.0 + 2 * (n % 2)
        assert guard.admit(value, value / 2)
    return guard


def test_a_spike_is_above_six_deviations_and_five_times_the_largest():
    guard = calm(Guard())
    assert guard.admit(15.0, 0.0) and not guard.admit(75.1, 0.0)  # 5 times 3, 5 times 15
    assert guard.end_step(1)[0].startswith("grad_norm 75.1 is a spike: the last 65 steps had 2.2 on average")
    guard = calm(Guard())
    assert guard.admit(1.0, 7.5) and not guard.admit(1.0, 37.6) and guard.refused[0].startswith("loss 37.6 is a spike")
    # mean 2 + 15 deviations of 1 = 17, which is more than 5 times 3
    assert calm(Guard(spike_sigma=15.0)).admit(16.9) and not calm(Guard(spike_sigma=15.0)).admit(17.1)


def test_spikes_are_looked_for_after_64_steps_and_only_where_asked():
    assert calm(Guard(), 63).admit(1e6) and not calm(Guard(), 64).admit(1e6)
    assert calm(Guard(spike_sigma=0.0)).admit(1e6)


def test_the_window_holds_the_last_128_steps_that_were_taken():
    guard = Guard()
    guard.admit(100.0)
    calm(guard, 127)
    assert guard.admit(490.0)  # five times 100 is the limit as long as 100 is among the last 128
    guard = Guard()
    guard.admit(100.0)
    calm(guard, 128)
    assert not guard.admit(490.0) and not guard.admit(math.nan) and not guard.admit(0.0)
    assert len(guard.window) == 128 and max(norm for _, norm in guard.window) == 3.0
    assert guard.skipped == 2 and guard.empty == 1


@pytest.mark.parametrize(
    "norm, loss, name", [(1.0, math.nan, "loss"), (0.0, math.inf, "loss"), (-math.inf, 0.0, "grad_norm")]
)
def test_either_number_refuses_a_step(norm, loss, name):
    guard = Guard()
    assert not guard.admit(norm, loss)
    (reason,) = guard.end_step(1)
    assert reason.startswith(f"{name} is ") and guard.window == [] and guard.end_step(2) == []


def test_many_bad_passes_of_one_batch_are_one_bad_step():
    guard = Guard()
    for step in (1, 2):
        for _ in range(8):
            guard.admit(math.nan)
        guard.end_step(step)
        guard.give_up()
    assert (guard.skipped, guard.in_a_row) == (16, 2)
    guard.admit(math.nan)
    guard.end_step(3)
    with pytest.raises(
        NumericsError, match="3 steps in a row were refused, the last because grad_norm is nan"
    ) as error:
        guard.give_up()
    assert error.value.exit_code == 4 and "spike" not in str(error.value)


@pytest.mark.promise("B2")
def test_more_than_ten_in_a_thousand_end_the_run():
    guard = Guard()
    for step in range(1, 5001):
        guard.admit(math.nan if step % 100 == 0 else 1.0)
        guard.end_step(step)
        guard.give_up()  # ten of the last thousand
    guard.admit(math.nan)
    guard.end_step(5001)
    with pytest.raises(NumericsError, match="11 of the last 1000 steps were refused"):
        guard.give_up()


def test_spikes_in_a_row_end_the_run_and_the_flag_is_named():
    guard = calm(Guard())
    for step in range(3):
        guard.admit(1e4)
        guard.end_step(step)
    with pytest.raises(NumericsError, match="grad_norm 1e.04 is a spike.*--spike-sigma 0 lets spikes pass"):
        guard.give_up()


def test_spikes_now_and_then_do_not():
    guard = calm(Guard())
    for step in range(100):
        guard.admit(1e4 if step % 3 else 1.0)
        guard.end_step(step)
        guard.give_up()
    assert guard.skipped == 66 and guard.bad_steps == []


def test_a_restart_forgets_nothing():
    guard = calm(Guard(), 100)
    guard.admit(math.nan)
    guard.end_step(7)
    guard.admit(0.0)
    again = Guard()
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.state_dict() == guard.state_dict()
    assert (again.skipped, again.empty, again.in_a_row, again.bad_steps) == (1, 1, 1, [7])
    assert not again.admit(15.1)


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_are_no_spikes(seed):
    """Norms as a policy gradient has them: log-normal, now and then a hundred times the median."""
    guard, generator = Guard(), random.Random(seed)
    norms = [generator.lognormvariate(-1.2, 1.5) for _ in range(500)]
    assert sum(guard.admit(norm, generator.gauss(0, 1e-3)) for norm in norms) >= 498
    assert max(norms) > 20 * sorted(norms)[250]


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.promise("B3", trials=7)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_a_thousand_times_too_large_are_refused_and_no_others(seed, tmp_path, planned):
    """500 steps of the embedded run, seven of them broken; of the others at most one in 200 may be refused.

    Once the policy has nearly converged, sound norms reach two hundred times the median: then a thousand times a small
    one may lie within five times the largest, and is clipped like that. So they are broken early: with seeds 0 to 6
    a thousand times any norm of the steps 66 to 105 is at least 3.8 times what is refused, up to step 145 1.5 times.
    Of the sound steps none was refused with six seeds, and one of 500 with another instruction set.
    """
    broken = (70, 75, 80, 85, 90, 95, 100)
    planned(",".join(f"x=1000@grad:{n}" for n in broken))
    trainer = make_trainer(
        tmp_path,
        "--problems-per-step",
        8,
        "--steps",
        500,
        "--eval-limit",
        4,
        "--seed",
        seed,
        "--sample-every",
        0,
        "--rollouts-every",
        0,
    )
    assert trainer.run() == "done"
    skipped = [step for step, row in enumerate(step_records(tmp_path), 1) if float.fromhex(row["skipped"])]
    assert set(broken) <= set(skipped) and len(skipped) <= len(broken) + 2
