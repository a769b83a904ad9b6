"""`make gpu` as far as it goes without a GPU: time limits, partial results, going on; what its stages run exists."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_stages
import pytest
import staged
import torch
from staged import Stage
from timing import Report

from fastrl.settings.run import configure

ROOT = Path(__file__).parents[2]
ABOUT = {"versions": {"torch": "2"}}
BENCHMARKS = [stage for stage in gpu.STAGES if "gpu_stages" not in stage.command[1] and not stage.needs]
SAYS = "import json, sys; json.dump({'says': 'found 1', 'rows': [1]}, open(sys.argv[1], 'w'))\n"


def python(name: str, code: str, limit: int = 60, needs: str = "") -> Stage:
    return Stage(name, limit, (sys.executable, "-c", code, "{out}"), "something", needs)


def run(folder: Path, *stages: Stage, budget: float = 100, resume: bool = False) -> dict[str, dict]:
    """Stage -> its result, which is what its file says."""
    results = staged.run_stages(list(stages), folder, budget=budget, about=ABOUT, resume=resume)
    for result in results:
        assert json.loads((folder / f"{result['stage']}.json").read_text()) == result
    in_short = json.loads((folder / "summary.json").read_text())["stages"]
    known = {s["stage"]: s["rc"] for s in in_short}
    assert len(known) == len(in_short) and known.items() >= {r["stage"]: r["rc"] for r in results}.items()
    return {result["stage"]: result for result in results}


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # one that nobody has waited for has ended all the same


def test_a_stage_that_hangs_ends_at_its_limit_with_its_children_and_keeps_what_it_had(tmp_path):
    hangs = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
json.dump({"says": "half", "rows": [child.pid]}, open(sys.argv[1], "w"))
print("so far", flush=True)
time.sleep(100)
"""
    begin = time.monotonic()
    found = run(tmp_path, python("hangs", hangs, limit=3), python("after", SAYS))
    assert time.monotonic() - begin < 60
    hung = found["hangs"]
    assert (hung["rc"], hung["limit"], hung["tail"]) == ("timeout", 3, "so far\n") and hung["seconds"] >= 3
    assert hung["says"] == "half; so far"
    (pid,) = hung["result"]["rows"]
    deadline = time.monotonic() + 20
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(pid)
    assert found["after"]["rc"] == 0 and found["after"]["result"]["rows"] == [1]


def test_a_stage_that_fails_or_crashes_stops_no_other(tmp_path, capsys):
    fails = SAYS + "print('to the end'); sys.exit('no such kernel')"
    crashes = "import os, sys; open(sys.argv[1], 'w').write('{half'); os.kill(os.getpid(), 11)"
    found = run(tmp_path, python("fails", fails), python("crashes", crashes), python("after", SAYS))
    assert found["fails"]["rc"] == 1 and found["fails"]["says"] == "found 1; no such kernel"
    assert found["fails"]["result"]["rows"] == [1] and found["fails"]["tail"] == "to the end\nno such kernel\n"
    assert found["crashes"]["rc"] == -11 and found["crashes"]["result"] == {}
    after = found["after"]
    assert after["command"].startswith(sys.executable) and after["versions"] == {"torch": "2"} and "tail" not in after
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["fails", "1"], ["crashes", "-11"], ["after", "0"]]
    assert lines[2].endswith("found 1")
    kept = {f"{name}.{kind}" for name in found for kind in ("json", "log")} | {"summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_what_goes_on_runs_only_what_has_no_good_result(tmp_path):
    def counted(name: str, then: str = "") -> Stage:
        return python(name, f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n{SAYS}{then}")

    stages = [counted("good"), counted("bad", "sys.exit(3)"), counted("new")]
    run(tmp_path / "out", *stages[:2])
    found = run(tmp_path / "out", *stages, resume=True)
    assert (tmp_path / "ran").read_text() == "good bad bad new "
    assert [found[name]["rc"] for name in ("good", "bad", "new")] == [0, 3, 0]
    run(tmp_path / "out", stages[0])
    assert (tmp_path / "ran").read_text().endswith("new good ")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())  # of all that the folder has
    assert [(s["stage"], s["rc"]) for s in summary["stages"]] == [("good", 0), ("bad", 3), ("new", 0)]


def test_without_time_or_a_package_a_stage_is_skipped_and_an_earlier_result_stays(tmp_path):
    fails = python("fails", SAYS + "sys.exit(3)")
    run(tmp_path, fails)
    found = run(tmp_path, fails, python("late", SAYS), budget=staged.LEAST_S - 1, resume=True)
    assert found["late"] | {"rc": "skipped", "says": "no time left"} == found["late"] and "seconds" not in found["late"]
    assert found["fails"]["rc"] == 3 and found["fails"]["result"]["rows"] == [1]


def test_a_stage_ends_at_the_budget_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "LEAST_S", 1)
    left = tmp_path / "left"
    hangs = f"import tempfile, time; open({str(left)!r}, 'w').write(tempfile.mkdtemp()); time.sleep(100)"
    needs = python("needs", SAYS, needs="no_such_package")
    found = run(tmp_path / "out", python("hangs", hangs), needs, budget=3)
    assert found["hangs"]["rc"] == "timeout" and found["hangs"]["seconds"] < 60
    assert not Path(left.read_text()).exists()
    assert (found["needs"]["rc"], found["needs"]["says"]) == ("skipped", "no_such_package is not installed")


def test_a_runner_that_is_killed_leaves_what_is_known(tmp_path):
    kills = "import os, time; print('begun', flush=True); os.kill(os.getppid(), 9); time.sleep(3)"
    code = f"import sys; sys.path[:0] = {[str(ROOT / 'bench'), str(ROOT)]!r}; import staged; from pathlib import Path\n"
    code += "make = lambda name, code: staged.Stage(name, 5, (sys.executable, '-c', code, '{out}'), '')\n"
    code += f"stages = [make('good', {SAYS!r}), make('kills', {SAYS + kills!r})]\n"
    code += f"staged.run_stages(stages, Path({str(tmp_path)!r}), budget=50, about={{}})\n"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -9
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found["good.json"]["rc"] == 0 and found["kills.json"]["rc"] == "running"
    assert found["kills.partial.json"]["rows"] == [1] and (tmp_path / "kills.log").read_text() == "begun\n"
    assert [stage["stage"] for stage in found["summary.json"]["stages"]] == ["good"]


@pytest.mark.parametrize("starts", [["bench/gpu.py"], ["make"]])
def test_without_a_gpu_there_is_one_line_and_code_2(starts, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OUT": str(tmp_path / "out")}
    command = [sys.executable, ROOT / starts[0], "--out", tmp_path / "out"]
    if starts == ["make"]:
        command = ["make", "--no-print-directory", "gpu", f"PYTHON_GPU={sys.executable}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 2 and ran.stdout == "" and not (tmp_path / "out").exists()
    said = [line for line in ran.stderr.splitlines() if not re.match(r"make(\[\d+\])?: \*\*\*", line)]
    assert len(said) == 1 and said[0].startswith("no GPU: torch ")


def test_results_go_into_a_new_folder_or_into_the_newest_to_go_on(tmp_path):
    first = gpu.folder_in(tmp_path, resume=True)
    assert first.parent == tmp_path and first.name.startswith("gpu_2")
    first.mkdir()
    second = gpu.folder_in(tmp_path, resume=False)
    assert second == Path(f"{first}.2") and gpu.folder_in(tmp_path, resume=True) == first
    second.mkdir()
    os.utime(first, (1, 1))
    assert gpu.folder_in(tmp_path, resume=True) == second


def test_every_stage_has_a_program_and_is_documented():
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = [f"| `{stage.name}` | {stage.limit} | {stage.shows} |" for stage in gpu.STAGES]
    assert "| stage | limit, s | what it shows |\n|---|---|---|\n" + "\n".join(rows) + "\n\n" in page
    names = [s.name for s in gpu.STAGES]
    assert len(set(names)) == len(names) and "summary" not in names
    for stage in gpu.STAGES:
        program = Path(stage.command[1])
        assert program.exists() and "{out}" in stage.command
        assert program.name != "gpu_stages.py" or stage.name in gpu_stages.STAGES
    assert gpu_stages.STAGES.keys() <= set(names)
    assert all((ROOT / path).exists() for path in gpu_stages.KERNEL_TESTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes as long as it takes on a GPU")
@pytest.mark.parametrize("stage", BENCHMARKS, ids=lambda stage: stage.name)
def test_the_arguments_of_a_benchmark_are_arguments(stage, tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [word.replace("{out}", str(out)) for word in stage.command[1:]])
    runpy.run_path(stage.command[1], run_name="__main__")
    document = json.loads(out.read_text())
    assert document["complete"] and document["rows"] and not document["measured"]


@pytest.mark.parametrize("name", gpu_stages.RUNS)
def test_the_flags_of_a_run_are_flags(name):
    on_cpu = ["--device", "cpu", "--dtype", "bfloat16"]  # the last word on both
    config = configure([*gpu_stages.SMALL, *gpu_stages.RUNS[name].split(), *on_cpu])
    assert config.run.steps == 3 and config.run.save_at_end


@pytest.mark.slow
def test_runs_have_a_row_each_and_those_that_fail_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_stages.RUNS, "broken", "--no-such-flag")
    out = tmp_path / "train.json"
    with pytest.raises(SystemExit, match="there is no option --no-such-flag"):
        gpu_stages.train(Report("train", str(out)), ["float32", "broken"])
    document = json.loads(out.read_text())
    broken, good = document["rows"]  # in the order in which they ended
    assert (broken["run"], broken["rc"], broken["steps"]) == ("broken", 2, 0)
    assert (good["run"], good["rc"], good["steps"]) == ("float32", 0, 3) and good["grad_norm"] > 0
    assert good["start"][0].startswith("fastrl ") and good["start"][-1].startswith("start-up took")
    assert document["says"] == "1 of 2 runs; failed: broken" and document["complete"]


@pytest.mark.slow
def test_tests_are_counted_and_those_that_fail_are_named(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2\n\n"
        "@pytest.mark.skip\ndef test_left():\n    pass\n"
    )
    out = tmp_path / "tests.json"
    code = f"import gpu_stages as g; g.KERNEL_TESTS = [{str(tmp_path)!r}]; g.kernel_tests(g.Report('t', {str(out)!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'bench'}:{ROOT}"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    document = json.loads(out.read_text())
    assert document["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    (failed,) = document["failed"]
    assert failed["test"].endswith("test_some.py::test_bad") and "assert 1 == 2" in failed["why"]
    assert document["says"] == "1 passed, 1 failed, 1 skipped"
