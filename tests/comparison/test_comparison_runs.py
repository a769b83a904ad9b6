"""Lists of methods, what of them is refused, and their runs; that a finished comparison starts nothing."""

import json
import signal
import subprocess
import sys
import time

import pytest

from fastrl.comparison.methods import Method, check_protocol
from fastrl.comparison.plan import read_plan
from fastrl.comparison.runs import Run
from support.run_folders import rows as logged

LIST = """
args = "--eval arithmetic --eval-every 1 --steps 4"
target = 0.8
lr_factors = [0.5, 2]
[[method]]
name = "grpo"
args = "--lr 2e-4"
[[method]]
name = "sfpo"
args = "--update sfpo"
[[method]]
name = "grpo-lr"
control_of = "sfpo"
lr_from = "sfpo"
lr_factor = 3.4
[[claim]]
method = "sfpo"
cost = "rollouts"
at_most = 0.45
"""


@pytest.fixture
def listed(tmp_path):
    """Write a list of methods, with changes -> its path."""

    def write(*changes: tuple[str, str]) -> str:
        text = LIST
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        path = tmp_path / "list.toml"
        path.write_text(text)
        return str(path)

    return write


def test_a_grid_per_tuned_method_and_a_control_at_the_rate_of_what_it_controls(listed):
    plan = read_plan([listed(), "--seeds", "2", "--target", "0.7"])
    assert [(r.method, r.lr, r.seed) for r in plan.grid(1000)] == [
        ("sfpo", 5e-5, 1000),
        ("sfpo", 2e-4, 1000),
        ("grpo", 1e-4, 1000),
        ("grpo", 4e-4, 1000),
    ]
    runs = plan.reported({"grpo": 1e-4, "sfpo": 2e-4}, {"grpo": 9.0, "sfpo": 30.0})
    # what was never timed comes first, then the longest
    assert [(r.method, r.lr, r.seed) for r in runs] == [
        ("grpo-lr", 6.8e-4, 0),
        ("grpo-lr", 6.8e-4, 1),
        ("sfpo", 2e-4, 0),
        ("sfpo", 2e-4, 1),
        ("grpo", 1e-4, 0),
        ("grpo", 1e-4, 1),
    ]
    args = " ".join(runs[2].args)
    assert args.startswith("--eval arithmetic --eval-every 1 --steps 4 --update sfpo --stop-at-accuracy 0.7 ")
    assert "--optim.lr 0.0002 --seed 0 --threads 1" in args


def test_a_rate_is_tried_again_only_where_it_can_still_win(listed):
    plan = read_plan([listed()])

    def again(**reached: tuple[bool, bool]) -> set:
        rates = {"sfpo": (5e-5, 2e-4), "grpo": (1e-4, 4e-4)}
        tried = [
            {"method": name, "lr": lr, "reached": ok}
            for name, oks in reached.items()
            for lr, ok in zip(rates[name], oks, strict=True)
        ]
        return {(r.method, r.lr, r.seed) for r in plan.grid(1001, tried)}

    both = {("grpo", 1e-4, 1001), ("grpo", 4e-4, 1001)}
    assert again(sfpo=(True, False), grpo=(True, True)) == both  # sfpo has one rate left
    assert again(sfpo=(False, True), grpo=(False, False)) == both  # grpo has none that reached the target


def test_a_recipe_of_a_method_takes_the_place_of_the_common_one():
    common = "all.toml --steps 4"
    assert Method(name="m", args="--lr 1e-3").command(common) == ["all.toml", "--steps", "4", "--lr", "1e-3"]
    assert Method(name="m", args="own.toml --lr 1").command(common) == ["own.toml", "--steps", "4", "--lr", "1"]


def test_only_some_methods_and_what_they_need(listed):
    plan = read_plan([listed(), "--only", "grpo-lr"])
    assert [m.name for m in plan.methods] == ["grpo", "sfpo", "grpo-lr"]  # sfpo gives the learning rate
    plan = read_plan([listed(), "--only", "grpo"])
    assert [m.name for m in plan.methods] == ["grpo"] and not plan.claims


def test_the_preset_can_be_planned():
    plan = read_plan(["--preset", "embedded"])
    names = {m.name for m in plan.methods}
    assert {m.control_of for m in plan.methods} - {""} <= names and "grpo" in names
    assert len({(r.method, r.lr) for r in plan.grid(1000)}) == 3 * len(plan.tuned)


BAD = [
    ([("lr_factor = 3.4", "lr_factr = 3.4")], "method grpo-lr: there is no key 'lr_factr'; did you mean lr_factor"),
    ([("target = 0.8", "targt = 0.8")], "list.toml: there is no key 'targt'; did you mean target"),
    ([('control_of = "sfpo"', 'control_of = "sfop"')], "names 'sfop', which is no method; did you mean sfpo"),
    ([('method = "sfpo"', 'method = "spfo"')], "claim 1: method names 'spfo', which is no method; did you mean sfpo"),
    ([('cost = "rollouts"', 'cost = "hours"')], "cost must be one of rollouts, backward_passes, seconds, tokens"),
    ([("lr_factor = 3.4", 'lr_factor = "3.4"')], "method grpo-lr: lr_factor must be a number, got '3.4'"),
    ([('lr_from = "sfpo"\n', "")], "method grpo-lr: lr_factor 3.4 of what"),
    ([('name = "sfpo"', 'name = "grpo"')], "two methods are called grpo"),
    ([('name = "sfpo"\n', "")], "method 2: name is missing"),
    ([('name = "sfpo"', 'name = "../sfpo"')], "a method's name must be"),
    ([("--update sfpo", "--updat sfpo")], "method sfpo: the command line: there is no option --updat"),
    ([("--eval-every 1", "")], "method grpo: --stop-at-accuracy looks at evaluations"),
    ([("--update sfpo", "--update sfpo --eval-k 2")], "sfpo is evaluated with --eval-k 2 and grpo with 8; accuracies"),
    ([("target = 0.8", "target = 80")], "--target must be above 0 and at most 1, got 80"),
    ([("target = 0.8", "tuning_seeds = [1000, 3]")], "--tuning-seeds: 3 is one of the 5 reported seeds"),
    ([("target = 0.8", "tuning_seeds = [7, 7]")], "--tuning-seeds must be one or more different numbers, got (7, 7)"),
    ([("[0.5, 2]", "[1, 1]")], "--lr-factors must be different numbers above 0"),
]


@pytest.mark.parametrize("changes, text", BAD, ids=[text[:40] for _, text in BAD])
def test_a_list_that_cannot_be_compared_is_refused(changes, text, listed):
    with pytest.raises(ValueError) as error:
        read_plan([listed(*changes)])
    assert text in str(error.value)


def test_what_is_to_be_compared_must_be_said(listed):
    with pytest.raises(ValueError, match="Name a list of methods.*or --preset embedded"):
        read_plan([])
    with pytest.raises(ValueError, match="there is no preset 'embeded'; did you mean embedded"):
        read_plan(["--preset", "embeded"])
    with pytest.raises(ValueError, match="--only gpro: there is no such method; did you mean grpo"):
        read_plan([listed(), "--only", "gpro"])
    with pytest.raises(ValueError, match="there is no option --seds; did you mean --seeds"):
        read_plan([listed(), "--seds", "3"])


def test_different_protocols_are_refused():
    settings = {"model": "m", "eval": ["sums"], "eval_k": 4, "task": {"template": "plain"}}
    check_protocol({"a": settings, "b": {**settings, "seed": 3}})
    with pytest.raises(
        ValueError, match=r"b is evaluated with --task.template chat and a with plain; accuracies are comp"
    ):
        check_protocol({"a": settings, "b": {**settings, "task": {"template": "chat"}}})


# runs


def run_in(folder, **changes) -> Run:
    return Run(**{"method": "grpo", "lr": 1e-4, "seed": 0, "folder": folder, "args": ("--steps", "4")} | changes)


def test_a_run_is_finished_when_it_ended_by_itself_with_these_arguments(tmp_path):
    run = run_in(tmp_path)
    assert not run.finished()
    (tmp_path / "manifest.json").write_text(json.dumps({"argv": ["--steps", "4", "--out", "elsewhere"]}))
    assert not run.finished() and run.same_arguments()
    for status, ended in (
        ({"reason": "target", "exit_code": 0}, True),
        ({"reason": "collapsed", "exit_code": 0}, True),
        ({"reason": "done", "exit_code": 0}, True),
        ({"reason": "NumericsError", "exit_code": 4}, True),
        ({"reason": "stopped", "exit_code": 75}, False),
        ({"reason": "DataError", "exit_code": 3}, False),
    ):
        (tmp_path / "status.json").write_text(json.dumps(status))
        assert run.finished() == ended, status
    (tmp_path / "status.json").write_text('{"reason": "done", "exit_code": 0}')
    assert not run_in(tmp_path, args=("--steps", "5")).finished()


TINY = """
args = "--problems-per-step 4 --limit 64 --eval-limit 8 --eval-k 2 --eval-every 1 --steps 2 --warmup 0"
seeds = 2
target = 0.99
lr_factors = [1.0]
[[method]]
name = "grpo"
[[method]]
name = "grpo-2passes"
args = "--epochs-per-batch 2"
control_of = "grpo"
lr_from = "grpo"
"""


@pytest.mark.slow
def test_two_variants_end_to_end(run_fastrl, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    first = run_fastrl("compare", "tiny.toml", "--jobs", 2, timeout=280)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "runs" / "compare-tiny"
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "compare.md").read_text()
    assert "| grpo | 0.0001 | 0 of 2 | > 64 [-, -] | > 2 [-, -] |" in report  # 2 steps of 4 x 8
    assert "| grpo-2passes | 0.0001 | 0 of 2 | > 64 [-, -] | > 4 [-, -] |" in report
    rows = json.loads((folder / "rows.json").read_text())
    assert [(r["method"], r["seed"], r["update"], r["reached"]) for r in rows] == [
        ("grpo", 0, "single", False),
        ("grpo", 1, "single", False),
        ("grpo-2passes", 0, "single", False),
        ("grpo-2passes", 1, "single", False),
    ]
    assert [r["settings"] for r in rows][1:3] == [{"update.epochs_per_batch": 1}, {"update.epochs_per_batch": 2}]
    assert json.loads((folder / "summary.json").read_text())["common_settings"]["optim.lr"] == 1e-4
    # the first step of the same seed samples the same completions
    one, two = (logged(folder / m / "lr-0.0001" / "seed-1") for m in ("grpo", "grpo-2passes"))
    assert one[1]["reward"] == two[1]["reward"]

    logs = sorted(folder.glob("*/*/*/metrics.jsonl"))
    before = [path.stat().st_mtime_ns for path in logs]
    assert len(logs) == 4 and not list(folder.glob("*/*/*/checkpoints"))
    again = run_fastrl("compare", "tiny.toml", "--jobs", 2)
    assert again.returncode == 0 and "comparison: 4 runs, 0 to do" in again.stdout
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/*/*/metrics.jsonl"))] == before


@pytest.mark.slow
def test_sigterm_saves_what_runs_so_that_the_same_command_goes_on(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("--steps 2", "--steps 1000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrl.compare", "tiny.toml", "--jobs", "1", "--only", "grpo"],
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "runs" / "compare-tiny" / "grpo" / "lr-0.0001" / "seed-0"
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(logged(folder)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75 and "the same command goes on" in said
    assert json.loads((folder / "status.json").read_text())["reason"] == "stopped"
    steps = [r["step"] for r in logged(folder) if "reward" in r]

    run = read_plan([str(tmp_path / "tiny.toml"), "--out", str(folder.parents[2]), "--only", "grpo"]).run(
        Method(name="grpo"), 1e-4, 0
    )
    assert run.same_arguments() and not run.finished()
    assert (folder / "checkpoints" / f"step-{steps[-1]}").exists()  # which --resume auto takes


@pytest.mark.slow
def test_a_run_that_cannot_start_ends_the_comparison_with_its_own_words(run_fastrl, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("--limit 64", "--data nowhere.jsonl --reward exact"))
    ended = run_fastrl("compare", "tiny.toml", "--jobs", 1)
    said = ended.stderr
    assert ended.returncode == 2 and "grpo-2passes lr 0.0001 seed 0 ended with exit code 3: " in said
    assert "nowhere.jsonl" in said and "runs/compare-tiny/grpo-2passes/lr-0.0001/seed-0.log" in said
