"""The profile: the same rewards however it is cut, and refused where it does not belong."""

import fcntl
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrl import checkpoint
from fastrl.base.types import Completion, DataError
from fastrl.models.loading import model_path
from fastrl.passrates import sampling
from fastrl.passrates.file import Profile, read_profile
from fastrl.passrates.key import ProfileKey, model_digest, verifier_key, weights_digest
from fastrl.passrates.sampling import right, sample_profile
from fastrl.step.metrics import spearman
from fastrl.step.trainer import Stopped
from support.arguments import SMALL_PROFILE
from support.run_folders import rows, step_records
from support.trainers import make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 24 problems that has made its profile."""
    return make_trainer(tmp_path_factory.mktemp("profile") / "run", *SMALL_PROFILE)


@pytest.fixture(scope="module")
def key(run):
    return run.profiler.key


def sample(run, path, **options):
    return sample_profile(run.rollout, run.profiler.problems, run.profiler.key, path, **options)


def lines_without_seconds(path):
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


class Interrupted(Exception):
    pass


ROW = b'{"id": "arithmetic/train/12", "rewards": [1.0], "right": [1.0], "lengths": [2]}\n'


@pytest.mark.parametrize("torn", [b"", ROW[:40], ROW + ROW, ROW + ROW[:40]], ids=["clean", "part", "rows", "rows+part"])
def test_an_interrupted_profile_goes_on_to_the_same_file(run, torn, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 16)  # 4 problems of 4 completions: 6 chunks
    whole = sample(run, tmp_path / "whole.jsonl")
    assert whole.complete and len({tuple(row["rewards"]) for row in whole.rows}) > 4
    cut, said, chunks = tmp_path / "cut.jsonl", [], iter(range(3))

    def leave():
        if next(chunks, None) is None:
            raise Interrupted

    with pytest.raises(Interrupted):
        sample(run, cut, leave=leave)
    assert len(read_profile(cut).rows) == 12 and read_profile(cut).num_rollouts == 48
    with cut.open("ab") as file:
        file.write(torn)  # an unfinished write
    finished = sample(run, cut, say=said.append)
    assert said[0].startswith("profile: 16 of 24 problems") and len(said) == 3  # only the rest was sampled
    assert lines_without_seconds(cut) == lines_without_seconds(tmp_path / "whole.jsonl")
    assert finished.rows == whole.rows == read_profile(cut).rows
    assert finished.totals() | {"seconds": 0} == whole.totals() | {"seconds": 0}


def test_a_finished_profile_is_only_read(run, tmp_path):
    path = tmp_path / "p.jsonl"
    first = sample(run, path)
    path.chmod(0o444)
    before = path.stat().st_mtime_ns
    assert sample(run, path, say=pytest.fail).rows == first.rows
    assert path.stat().st_mtime_ns == before


def test_totals_count_every_token(run):
    profile, problems = run.profiler.profile, run.profiler.problems
    prompts = sum(len(p.prompt_ids) for p in problems)
    completions = sum(sum(row["lengths"]) for row in profile.rows)
    assert profile.num_rollouts == 24 * 4 and profile.num_tokens == 4 * prompts + completions
    assert profile.seconds > 0


def test_problems_carry_their_own_rewards(run):
    by_id = {row["id"]: row for row in run.profiler.profile.rows}
    for problem in run.profiler.problems:
        assert problem.profile_rewards.tolist() == by_id[problem.id]["rewards"]
        assert problem.profile_rewards.dtype == torch.float32 and len(problem.profile_rewards) == 4


def test_the_seeds_are_those_of_stream_problem_and_number(run):
    problem = run.profiler.problems[5]
    group = run.rollout.sample([(problem, 4)], run.rollout.sampling, "profile")[0]
    lengths = next(row["lengths"] for row in run.profiler.profile.rows if row["id"] == problem.id)
    assert [len(c.token_ids) for c in group.completions] == lengths


OTHER = {
    "model": ("ffff", "--model"),
    "prompts": ("ffff", "--data"),
    "verifier": ({"math": 0.5}, "--reward"),
    "sampling": ({"temperature": 0.7, "max_new_tokens": 10, "grade_truncated": False}, "--temperature"),
    "seed": (7, "--seed"),
    "num_completions": (5, "--num-profile-completions"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_foreign_profile_is_refused_by_the_field_that_differs(run, key, name, tmp_path):
    value, flag = OTHER[name]
    wanted = replace(key, **{name: value})
    with pytest.raises(ValueError) as error:
        sample_profile(run.rollout, run.profiler.problems, wanted, run.profiler.path)
    assert f"{name} was {getattr(key, name)} and is now {value} ({flag}" in str(error.value)
    assert str(run.profiler.path) in str(error.value) and "leave --profile out" in str(error.value)


def test_fewer_completions_than_stored_are_the_first_ones(run, key, tmp_path):
    fewer = replace(key, num_completions=3)
    profile = sample_profile(run.rollout, run.profiler.problems, fewer, run.profiler.path).first(3)
    for short, long in zip(profile.rows, run.profiler.profile.rows, strict=True):
        assert short["rewards"] == long["rewards"][:3] and short["right"] == long["right"][:3]
        assert short["id"] == long["id"] and short["lengths"] == long["lengths"][:3]
    assert profile.pass_rates() == [sum(row["rewards"][:3]) / 3 for row in run.profiler.profile.rows]
    assert profile.num_rollouts == 96  # what it cost


def test_the_key_sees_what_rewards_depend_on(run, key, tmp_path):
    problems = run.profiler.problems
    settings = {
        "model": "embedded",
        "problems": problems,
        "rewards": ["last_character"],
        "sampling": run.rollout.sampling,
        "grade_truncated": False,
        "seed": 0,
        "num_completions": 4,
    }
    assert ProfileKey.of(**settings) == key
    p = problems[0]
    for other in (replace(p, id="z"), replace(p, answer="z"), replace(p, prompt_ids=p.prompt_ids[:-1])):
        changed = ProfileKey.of(**settings | {"problems": [other, *problems[1:]]})
        assert changed.prompts != key.prompts and changed.digest != key.digest
    assert ProfileKey.of(**settings | {"grade_truncated": True}).sampling != key.sampling


def test_a_user_function_counts_by_its_text_and_weight(tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def f(completions, **columns):\n    return [1.0] * len(completions)\n")
    first = verifier_key([f"{file}:f", "math:0.5"])
    assert list(first.values()) == [1.0, 0.5] and "math" in first
    moved = tmp_path / "g.py"
    shutil.copy(file, moved)
    assert verifier_key([f"{moved}:f", "math:0.5"]) == first
    assert verifier_key([f"{file}:f:2", "math:0.5"]) != first
    file.write_text(file.read_text().replace("1.0", "0.9"))
    assert verifier_key([f"{file}:f", "math:0.5"]) != first


def test_the_model_counts_by_weights_and_configuration(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_path("embedded"), folder)
    first = model_digest(str(folder))
    assert first == model_digest("embedded")
    (folder / "optim-rank0.safetensors").write_bytes(b"not weights")
    (folder / "README.md").write_text("words")
    assert model_digest(str(folder)) == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    for file, content in (("model.safetensors", bytes(weights)), ("config.json", b"{}")):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        assert model_digest(str(folder)) != first
        (folder / file).write_bytes(original)
    assert model_digest(str(folder)) == first


def test_weights_count_bit_by_bit():
    weights = torch.arange(5, dtype=torch.bfloat16)
    changed = weights.clone()
    changed[4] = 4.03125  # the next bfloat16
    assert weights_digest(weights) == weights_digest(weights.clone()) != weights_digest(changed)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "1+1=", "answer": "2"}\n', "p.jsonl:1: not the first line of a profile"),
        ("words\n", "p.jsonl:1: not the first line of a profile"),
        ("HEADER\nwords\n", "p.jsonl:2: not a line of a profile"),
        ('HEADER\n{"id": "a", "rewards": [1.0]}\n', "p.jsonl:2: not a line of a profile"),
        ('HEADER\n{"num_rollouts": 3, "furlongs": 1}\n', "p.jsonl:2: not a line of a profile"),
        ("VERSION2\n", "a profile of version 2, but this fastrl reads 1"),
    ],
)
def test_a_file_that_is_no_profile_is_named(key, text, message, tmp_path):
    header = Profile(key=key, num_problems=2).header()
    text = text.replace("HEADER", json.dumps(header)).replace("VERSION2", json.dumps(header | {"fastrl_profile": 2}))
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_profile(tmp_path / "p.jsonl")


def test_nothing_finished_is_no_profile(key, tmp_path):
    path = tmp_path / "p.jsonl"
    assert read_profile(path) is None
    path.write_text(json.dumps(Profile(key=key, num_problems=2).header())[:40])  # the header was cut off
    assert read_profile(path) is None


def test_two_processes_do_not_write_one_profile(run, tmp_path):
    path = tmp_path / "p.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="p.jsonl: another process is writing this profile"):
            sample(run, path)
    assert sample(run, path).complete


def of_right(counts, n=4):
    """A profile of one problem for each number of right completions."""
    rows = [
        {"id": str(i), "rewards": [1.0] * s + [0.0] * (n - s), "right": [1.0] * s + [0.0] * (n - s), "lengths": [3] * n}
        for i, s in enumerate(counts)
    ]
    key = ProfileKey(model="m", prompts="p", verifier={}, sampling={}, seed=0, num_completions=n)
    return Profile(key=key, num_problems=len(rows), rows=rows, num_rollouts=24, num_tokens=99, seconds=2.0)


def test_summary_by_hand():
    profile = of_right([0, 0, 1, 2, 4, 4])
    # pass rates 0, 0, .25, .5, 1, 1: mean 2.75 / 6 = 0.458
    assert profile.summary() == (
        "6 problems x 4 completions: 24 rollouts, 99 tokens, 2.0 s; pass rate 0.458, never solved 0.333, always 0.333"
    )
    # pass@2 = 1 - C(4-s, 2)/6: s = 1: 1/2, s = 2: 5/6, s = 4: 1; (1/2 + 5/6 + 2) / 6 = 0.556
    assert profile.histogram() == [
        f"0/4       2 {'#' * 40}",
        f"1/4       1 {'#' * 20}",
        f"2/4       1 {'#' * 20}",
        "3/4       0",
        f"4/4       2 {'#' * 40}",
        "pass@1 0.458  pass@2 0.556  pass@4 0.667",
    ]
    assert profile.metrics() == {
        "profile/num_rollouts": 24,
        "profile/num_tokens": 99,
        "profile/seconds": 2.0,
        "profile/pass_rate": pytest.approx(2.75 / 6),
        "profile/frac_never_solved": pytest.approx(1 / 3),
        "profile/frac_always_solved": pytest.approx(1 / 3),
    }


def test_right_is_the_first_verifiers_word_or_the_reward_itself(run):
    completion = Completion(token_ids=[], rollout_logprobs=[], finish_reason="stop", reward=0.2)
    completion.rewards = {"last_character": 1.0, "brevity": -4.0}
    assert right(run.rollout, completion) == 1.0  # not 0.2, whatever the weights are
    completion.rewards = {}  # cut off by the length limit
    assert right(run.rollout, completion) == 0.0
    alone = replace(run.rollout, rewards=Alone())
    assert [right(alone, replace(completion, reward=r)) for r in (-1.0, 0.3, 1.2)] == [0.0, 0.3, 1.0]


class Alone:
    """Rewards of user functions only."""

    verifiers = ()


def test_rank_correlation_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # ranks of [0, 0, .5, 1] are 1.5, 1.5, 3, 4, of [0, .5, .5, 1] 1, 2.5, 2.5, 4; deviations from 2.5:
    # (-1, -1, .5, 1.5) and (-1.5, 0, 0, 1.5): products 1.5 + 2.25 = 3.75, squares 4.5 and 4.5
    assert spearman([0, 0, 0.5, 1], [0, 0.5, 0.5, 1]) == pytest.approx(3.75 / 4.5)
    assert spearman([1, 1, 1], [1, 2, 3]) != spearman([1, 1, 1], [1, 2, 3])  # NaN


def test_what_the_profile_costs_is_the_first_row(run):
    run.log.open()
    shutil.rmtree(run.folder)
    run.log.open()
    run.schedule.steps = 0
    run.run()
    first = rows(run.folder)[0]
    assert first == {"step": 0, **run.profiler.profile.metrics()}
    assert first["profile/num_rollouts"] == 96 and 0 < first["profile/pass_rate"] < 1


NOISE = """
import random
def noise(completions, **columns):
    return [random.random() < 0.5 for _ in completions]
"""


def test_making_a_profile_leaves_the_run_as_finding_one_does(tmp_path):
    (tmp_path / "noise.py").write_text(NOISE)
    args = [*SMALL_PROFILE, "--steps", 2, "--reward", f"{tmp_path / 'noise.py'}:noise", "--unsolved-keep-frac", 1]
    for name in ("made", "found"):
        with checkpoint.generators_kept():
            random.seed(5)
            made = (tmp_path / "profiles").exists()
            trainer = make_trainer(tmp_path / name, *args)
            assert made == (name == "found") and len(list((tmp_path / "profiles").iterdir())) == 1
            trainer.run()
    assert step_records(tmp_path / "made") == step_records(tmp_path / "found")


def test_a_signal_while_the_first_profile_is_made(tmp_path):
    with pytest.raises(Stopped, match="stopped while the profile was being sampled; the same command goes on"):
        make_trainer(tmp_path / "run", *SMALL_PROFILE, stop_requested=lambda: True)
    assert Stopped.exit_code == 75
    path = next((tmp_path / "profiles").iterdir())
    assert read_profile(path).rows == []  # the header is there; the next command fills it
    make_trainer(tmp_path / "run", *SMALL_PROFILE)
    assert read_profile(path).complete


@pytest.mark.slow
@pytest.mark.soak
def test_two_ranks_make_the_same_profile(tmp_path):
    for world in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "-m",
            "fastrl.profile",
            "--limit",
            "15",
            "--out",
            f"{world}.jsonl",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("pass@1") == 1  # rank 0 alone speaks
    assert lines_without_seconds(tmp_path / "1.jsonl") == lines_without_seconds(tmp_path / "2.jsonl")


@pytest.mark.slow
def test_a_run_with_sgpo_cut_in_two_equals_one_that_was_not(tmp_path):
    args = "--allocation sgpo --limit 60 --problems-per-step 4 --eval-limit 4 --eval-k 2 --save-every 2".split()

    def train(*more: str) -> Path:
        command = [sys.executable, "-m", "fastrl.train", *args, "--steps", "4", "--threads", "1", *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        return tmp_path / "runs" / more[1]

    one = train("--name", "straight")
    shutil.copytree(one, tmp_path / "runs" / "cut")
    shutil.rmtree(tmp_path / "runs/cut/checkpoints/step-4")
    kept = (tmp_path / "runs/cut/metrics.jsonl").read_text().splitlines()
    (tmp_path / "runs/cut/metrics.jsonl").write_text("".join(f"{r}\n" for r in kept if json.loads(r)["step"] <= 2))
    profile = next((tmp_path / "runs/profiles").iterdir())
    before = profile.read_text()
    other = train("--name", "cut", "--resume", "auto")
    assert profile.read_text() == before and len(list(profile.parent.iterdir())) == 1
    assert step_records(one) == step_records(other) and len(step_records(one)) == 4
    sizes = [json.loads((f / "checkpoints/step-4/state.json").read_text())["allocator"] for f in (one, other)]
    assert sizes[0] == sizes[1] and sizes[0]["phase"] > 0
