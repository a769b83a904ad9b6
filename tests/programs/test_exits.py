"""What a program leaves on the terminal when it ends: its own line, or nothing."""

import subprocess
import sys

import pytest

from fastrl.base.log import RunLog
from fastrl.train import summary
from support.arguments import SHORT_RUN
from support.programs import ranks

ENDS = {
    "a run": (["--steps", "1"], 0, ""),
    "a run that fails": (["--steps", "1", "--eval-every", "1", "--save-every", "1"], 6, "fastrl: error: "),
    "help": (["--help"], 0, ""),
    "a mistake": (["--steps", "0"], 2, "fastrl: error: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_nothing_follows_the_last_line(name, tmp_path):
    """In a process of its own: the interpreter's teardown is what libraries complain in."""
    args, code, line = ENDS[name]
    environment = {"FASTRL_FAULT": "eio@save.model"} if name == "a run that fails" else {}
    command = [sys.executable, "-m", "fastrl.train", *SHORT_RUN, *args]
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run(command, cwd=tmp_path, env=env, timeout=200, text=True, capture_output=True)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == bool(line) and done.stderr.startswith(line), done.stderr


@pytest.mark.slow
def test_two_ranks_print_no_warning(tmp_path):
    both = ranks(tmp_path, 2, *SHORT_RUN, "--steps", 1)
    assert [run.wait() for run in both] == [0, 0]
    assert "Warning" not in "".join(run.text for run in both)


def test_only_the_rank_that_writes_the_log_reads_it(tmp_path):
    """At the end of a run the others may find half a line in it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    log = RunLog(tmp_path, total_steps=2, quiet=True)
    assert summary(log) == [] and log.curve() is None
