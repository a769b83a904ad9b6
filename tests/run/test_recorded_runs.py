"""Ten short runs against their record: every number of every step, and the weights and states that they end with.

To the bit where this machine rounds as the one of the record; elsewhere the numbers up to the first step, within 1e-3
or 1e-5 (in bfloat16 reward, entropy, gradient norm and loss, within wider limits), and no hashes. A change that moves
the numbers on purpose: python tests/support/recorded_runs.py tests/golden/runs.json
"""

import copy
import json
from pathlib import Path

import pytest

from support.recorded_runs import RUNS, difference, rounding_of_runs, run

RECORD = json.loads((Path(__file__).parents[1] / "golden" / "runs.json").read_text())


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict[str, str]:
    return rounding_of_runs(tmp_path_factory.mktemp("rounding"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_recorded_one(name, here, tmp_path):
    found = run(name, tmp_path)
    alike = here == RECORD["rounding"]
    assert difference(found, RECORD[name], to_the_bit=alike, bfloat16="bfloat16" in RUNS[name]) == ""


def test_what_the_runs_are_compared_by(here):
    assert RECORD.keys() == {"rounding", *RUNS}
    if here != RECORD["rounding"]:
        pytest.skip(f"numbers are rounded otherwise here, so only first steps were compared: {here}")


def changed(row: int, name: str, factor: float) -> dict:
    """The record of the GRPO run with one number changed."""
    one = copy.deepcopy(RECORD["grpo"])
    one["rows"][row][name] = (float.fromhex(one["rows"][row][name]) * factor).hex()
    return one


def test_one_changed_number_is_named():
    recorded = RECORD["grpo"]
    assert difference(recorded, recorded, to_the_bit=True) == difference(recorded, recorded, to_the_bit=False) == ""
    last_bit = difference(changed(5, "loss", 1 + 2**-52), recorded, to_the_bit=True)
    assert last_bit.startswith("row 5 (step 5): loss is -0.00083575107") and "recorded was -0.000835751" in last_bit
    # on another machine: what rounding moves, and what it does not; later steps are not looked at
    for factor, said in ((1 + 9e-4, ""), (1 + 2e-3, "row 1 (step 1): entropy is ")):
        assert difference(changed(1, "entropy", factor), recorded, to_the_bit=False).startswith(said)
    assert difference(changed(1, "entropy", 1 + 9e-4), recorded, to_the_bit=False) == ""
    assert difference(changed(2, "entropy", 2.0), recorded, to_the_bit=False) == ""
    # a token that is another one in bfloat16
    assert difference(changed(1, "num_tokens", 1.1), recorded, to_the_bit=False, bfloat16=True) == ""
    assert "reward is" in difference(changed(1, "reward", 1.5), recorded, to_the_bit=False, bfloat16=True)


def test_what_is_missing_is_named():
    recorded = RECORD["grpo"]
    short = recorded | {"rows": recorded["rows"][:-1]}
    assert difference(short, recorded, to_the_bit=True) == "6 rows, recorded were 7"
    other = copy.deepcopy(recorded)
    del other["rows"][1]["kl"]
    assert "metrics ['kl'] are missing" in difference(other, recorded, to_the_bit=False)
    other = recorded | {"sha256": recorded["sha256"] | {"model.safetensors": "0"}}
    assert "['model.safetensors'] are not" in difference(other, recorded, to_the_bit=True)
