"""With gmpy2 importable sympy computes in C code that no Python signal can interrupt: then only a kill helps.

gmpy2 is under the LGPL and no dependency of fastrl; other packages bring it. An environment of this test's own gets it
from the package registry.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[2]
BACKEND = "import sympy.external.gmpy as g; print(g.GROUND_TYPES)"
# the same grader with the variables removed that keep sympy away from gmpy2
GRADE = """
import json, sys, time
from fastrl.rewards import workers
workers.ENVIRONMENT.clear()
from fastrl.rewards.math import Math
with Math(workers=1, kill_cpu_s=3.0) as verifier:
    verifier.grade([r"\\boxed{x+x}"], ["2x"])
    for text in (r"100000000!", r"\\binom{10^9}{5\\cdot 10^8}"):
        start = time.monotonic()
        grades = verifier.grade([f"\\\\boxed{{{text}}}", r"\\boxed{x+x}"], ["2\\\\pi", "2x"])
        print(json.dumps([[g.status for g in grades], time.monotonic() - start]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """An interpreter that has all of this one's packages, and gmpy2."""
    folder = tmp_path_factory.mktemp("gmpy2")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "deps.pth").write_text("\n".join(dict.fromkeys(p for p in sys.path if p.endswith("site-packages"))))
    made = str(folder / "bin" / "python")
    got = subprocess.run([made, "-m", "pip", "install", "--quiet", "gmpy2"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"gmpy2 cannot be installed here: {got.stderr.strip().splitlines()[-1][:200]}")
    return made


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.promise("C2", trials=131)
def test_every_case_passes_with_gmpy2_installed(python, data_dir):
    assert subprocess.run([python, "-c", BACKEND], capture_output=True, text=True).stdout.strip() == "gmpy"
    answers = "tests/rewards/test_adversarial_answers.py"
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", answers, "-k", "numeric_only"]
    done = subprocess.run(
        [python, *suite, "--data-dir", str(data_dir)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.promise("C2", trials=2)
def test_c_code_that_no_signal_can_interrupt_is_killed(python):
    done = subprocess.run([python, "-c", GRADE], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        statuses, seconds = json.loads(line)
        assert statuses == ["hard_timeout", "right"] and seconds < 60
    assert len(done.stdout.splitlines()) == 2
