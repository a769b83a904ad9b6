"""A run that is killed again and again and goes on by itself is the undisturbed run; and a long one does not grow."""

import os
import random
import time
from pathlib import Path

import pytest

from support.run_folders import leftovers, rows
from support.run_in_pieces import RunInPieces, ended

KILLS, STEPS = 50, 2000


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return RunInPieces(tmp_path_factory.mktemp("built"), "--save-every", 2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.promise("A15", trials=KILLS)
def test_fifty_kills_in_one_run(pieces, tmp_path):
    """A kill every forty steps or so: these take a tenth of a second each."""
    rng = random.Random(0)
    for _ in range(KILLS):
        pieces.kill(tmp_path, rng.uniform(0.5, 8.0))
    steps = max(STEPS, pieces.check(tmp_path) + 2) // 2 * 2
    code, said = pieces.run(tmp_path, steps, timeout=3000)
    assert code == 0 and leftovers(tmp_path / "checkpoints") == []
    assert pieces.check(tmp_path) == steps  # weights and moments, by sha256
    assert [row["step"] for row in rows(tmp_path) if "reward" in row] == list(range(1, steps + 1))


def used(child: int) -> tuple[float, int]:
    """MiB that are resident, open files."""
    status = Path(f"/proc/{child}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return resident / 1024, len(os.listdir(f"/proc/{child}/fd"))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.promise("A15")
def test_a_long_run_does_not_grow(pieces, tmp_path):
    """Resident memory within 50 MiB, open files within 2, no zombies, between steps 60 and 1950 with 945 saves."""
    child, seen = pieces.start(tmp_path, STEPS), []
    for step in (60, 1950):
        while (
            not (tmp_path / "metrics.jsonl").exists()
            or f'"step": {step}' not in (tmp_path / "metrics.jsonl").read_text()
        ):
            time.sleep(0.1)
        seen.append(used(child))
    tasks = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    assert all("Z (zombie)" not in Path(f"/proc/{pid}/status").read_text() for pid in tasks)
    assert ended(child, 600) == 0
    assert seen[1][0] - seen[0][0] <= 50 and abs(seen[1][1] - seen[0][1]) <= 2
