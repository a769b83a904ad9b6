"""131 answers that hang, crash, exploit or fool a mathematical grader. Only ids are printed: some texts hold NUL,
lone surrogates or terminal escapes."""

import json
import os
import resource
import time
from pathlib import Path

import pytest

from fastrl.rewards.math import Math

pytestmark = [pytest.mark.realdata, pytest.mark.slow]

# cases of the class "either": no grade is required, but it must not move
GOLDEN = dict.fromkeys(
    "pow_mod dec_100k_zeros dec_repeating text_nested digits_commas_100k plus_50k final_answer_100KB_spaces "
    "spaces_in_num dots_100k or_chain u_fullwidth u_arabic u_zerowidth u_rtl u_nul u_combining unbalanced1 "
    "s_units_wrong s_pi8".split(),
    0.0,
) | dict.fromkeys("boxed_nested_1k boxed_x10k s_pct_50 s_thirds s_echo_expr s_last_wins".split(), 1.0)
# rewarded only if math-verify may evaluate the answer to a number
UNEVALUATED = ("s_gold_expr_uncomputed", "s_sum_uncomputed")

# required "accept" or "reject", and not reachable within the limits
DEVIATIONS = {
    "diff_of_huge": 0.0,  # a difference of two 50-million-digit numbers
    "set_vs_set_2k": 0.0,  # longer than the length limit
}


def decode(parts) -> str:
    """A string, or a list of parts: string | {repeat, times} | {range, sep} | {products} -> the text."""
    if isinstance(parts, str):
        return parts
    out = []
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        elif "repeat" in part:
            out.append(part["repeat"] * part["times"])
        elif "range" in part:
            out.append(part["sep"].join(str(i) for i in range(*part["range"])))
        else:
            n = part["products"]
            out.append(r"\\".join("&".join(str(i * j) for j in range(n)) for i in range(n)))
    return "".join(out)


# without numeric_only far more of the answers reach sympy
@pytest.fixture(scope="module", params=[True, False], ids=["numeric_only", "everything"])
def verifier(request):
    with Math(workers=1, numeric_only=request.param) as verifier:
        # the first answer also pays for starting the process
        assert verifier.grade([r"\boxed{2x}"], ["x+x"])[0].reward == 1.0
        yield verifier


def cpu_s(pids: list[int]) -> float:
    """CPU time of this process and of the running processes `pids`."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    own = resource.getrusage(resource.RUSAGE_SELF)
    return ticks / 100 + own.ru_utime + own.ru_stime


@pytest.mark.promise("C1", trials=131)
def test_every_case_is_graded_in_time_and_as_required(verifier, data_dir, tmp_path, monkeypatch):
    cases = json.loads((data_dir.parent / "design/checks/adversarial_answers.json").read_text())["cases"]
    assert len(cases) == 131
    monkeypatch.chdir(tmp_path)
    wrong, slow, golden = [], [], {}
    for case in cases:
        text, gold = decode(case["answer"]), decode(case["gold"])
        pids = verifier.workers.pids
        wall, cpu = time.monotonic(), cpu_s(pids)
        grade = verifier.grade([text], [gold])[0]
        wall = time.monotonic() - wall
        # a process that was killed took its CPU time with it, and never more than kill_cpu_s
        cpu = cpu_s(pids) - cpu if verifier.workers.pids == pids else 0.0
        # wall time is the machine's own: where it has other work for its cores, an answer waits its turn
        if wall > 5.0 * max(1.0, os.getloadavg()[0] / os.cpu_count()) or cpu > 2.0:
            slow.append((case["id"], round(wall, 2), round(cpu, 2)))
        if case["id"] in DEVIATIONS:
            required = DEVIATIONS[case["id"]]
        elif case["expected"] == "either":
            golden[case["id"]] = grade.reward
            continue
        else:
            required = float(case["expected"] == "accept")
        if grade.reward != required:
            wrong.append((case["id"], grade.status))
    assert wrong == []
    assert slow == []
    evaluates = float(not verifier.numeric_only)
    assert golden == GOLDEN | dict.fromkeys(UNEVALUATED, evaluates)
    assert not (tmp_path / "canary").exists()
    assert not Path("canary").exists()
