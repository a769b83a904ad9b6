"""`python -m fastrl.profile`, and the profile of a run as its user sees it."""

import json
import shutil
import sys

import pytest

from fastrl import profile, train
from fastrl.base.exits import run_program
from fastrl.models.loading import model_path

LIMIT = ["--limit", "20"]


@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
    """Run main() of a program the way `python -m` does -> (exit code, stdout, the error)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["fastrl", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            run_program(module.main)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit.value.code, captured.out, captured.err

    return run


@pytest.mark.slow
def test_a_run_finds_what_the_program_made(program, tmp_path):
    sgpo = ["--allocation", "sgpo", *LIMIT]
    code, out, _ = program(train, *sgpo, "--dry-run")
    assert code == 0
    planned = out.splitlines()[-1]
    assert planned.startswith("profile: to be made, 8 completions a problem, into runs/profiles/")
    assert not (tmp_path / "runs").exists()

    code, out, _ = program(profile, *LIMIT)
    assert code == 0
    path = planned.rpartition(" ")[2]
    assert [str(p.relative_to(tmp_path)) for p in (tmp_path / "runs").rglob("*.jsonl")] == [path]
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{path}: 20 problems x 8 completions: 160 rollou"))
    counts = [int(line.split()[1]) for line in lines[at + 1 : at + 10]]
    assert [line.split()[0] for line in lines[at + 1 : at + 10]] == [f"{s}/8" for s in range(9)] and sum(counts) == 20
    assert lines[at + 10].startswith("pass@1 0.")
    kept = sum(counts[1:7])
    assert lines[at + 11] == "uniform: 20 of 20 problems by group size: 20 x 8"
    assert lines[at + 12].startswith(f"sgpo: {kept} of 20 problems by group size, in phases: ")
    assert lines[at + 12].endswith(f" unsolved ones in every phase; {counts[7] + counts[8]} solved too often")
    assert lines[at + 13] == f"apo_filter: {20 - counts[0]} of 20 problems by group size: {20 - counts[0]} x 1"

    before = (tmp_path / path).read_text()
    code, out, _ = program(train, *sgpo, "--dry-run")
    assert code == 0 and out.splitlines()[-1].startswith(f"profile: {path}, 20 problems x 8 completions: 160 rollouts")
    code, again, _ = program(profile, *LIMIT)
    assert code == 0 and again.splitlines()[at + 1 - len(lines) :] == lines[at + 1 :]
    code, shown, _ = program(profile, "--show", path)
    assert code == 0 and shown.splitlines()[at + 1 - len(lines) :] == lines[at + 1 :]
    code, out, _ = program(train, *sgpo, "--steps", "1", "--problems-per-step", "2", "--eval-limit", "2")
    assert code == 0 and f"profile: {path}, 20 problems" in out and "profile: sampling" not in out
    assert "allocation: " in out and (tmp_path / path).read_text() == before
    first = json.loads((tmp_path / "runs/default/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["profile/num_rollouts"] == 160

    # fewer completions of a file that is named, and what it refuses
    named = ["--profile", path, *sgpo, "--dry-run"]
    code, out, _ = program(train, *named, "--num-profile-completions", "4")
    assert code == 0 and out.splitlines()[-1].startswith(f"profile: {path}, 20 problems x 4 completions")
    for change, complaint in (
        (["--num-profile-completions", "16"], "num_completions was 8 and is now 16"),
        (["--limit", "19"], "prompts was "),
        (["--seed", "1"], "seed was 0 and is now 1"),
        (["--temperature", "0.9"], "sampling was {'temperature': 1.0, 'max_new_tokens': 10"),
        (["--reward", "last_character:0.5"], "verifier was {'last_character': 1.0} and is now {'last_character': 0.5}"),
    ):
        code, _, error = program(train, *named, *change)
        assert code == 2 and complaint in error, error

    # a model whose weights are damaged: refused for being another one, before anybody tries to load it
    shutil.copytree(model_path("embedded"), tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    recipe = ["--data", "arithmetic", "--max-new-tokens", "10", "--max-prompt-tokens", "32"]
    code, _, error = program(train, "--model", tmp_path / "model", *recipe, "--profile", path, *sgpo)
    assert code == 2 and f"{path}: this profile is of another run: model was " in error


def test_a_recipe_of_a_run_is_that_of_its_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        'model = "m"\nreward = ["exact"]\nseed = 3\nnum_profile_completions = 4\nprofile = "p.jsonl"\nout = "folder"\n'
        'steps = 7\neval = ["math"]\n[task]\ntemplate = "plain"\n[optim]\nlr = 1e-3\n[allocation]\ntype = "sgpo"\n'
    )
    config = profile.configure(["r.toml", "--seed", "5", "--reward", "math"])
    assert (config.model, config.num_completions, config.out, config.steps) == ("m", 4, "p.jsonl", 7)
    assert config.seed == 5 and config.reward == ("math",) and config.task.template == "plain"
    embedded = profile.configure([])
    assert (embedded.data, embedded.sampling.max_new_tokens, embedded.task.max_prompt_tokens) == ("arithmetic", 10, 32)
    assert profile.configure(["--model", "m"]).data == "gsm8k"


BAD = [
    (train, ["--profile", "p.jsonl"], 2, "--profile p.jsonl: this objective and this allocation read none"),
    (train, ["--profile", "p.jsonl", "--allocation", "sgpo"], 2, "--profile p.jsonl: there is no such profile; make"),
    (train, ["--profile", "r.jsonl", "--allocation", "sgpo"], 3, "r.jsonl:1: not the first line of a profile"),
    (train, ["--reprofile-every", "5"], 2, "--reprofile-every is for an allocation that reads a profile"),
    (train, ["--reprofile-every", "-1"], 2, "--reprofile-every must be at least 0, got -1"),
    (train, ["--num-profile-completions", "0"], 2, "--num-profile-completions must be at least 1, got 0"),
    (train, ["--allocation", "apo_filter"], 2, "--allocation may sample 1; raise --group-size"),
    (train, ["--allocation", "sgpo", "--group-size", "8"], 2, "no option --group-size; did you mean --allocation.grou"),
    (train, ["--allocation", "sgpo", "--num-rollouts-per-step", "16", "--minibatches", "3"], 2, "--minibatches 3 cann"),
    (profile, ["--num-completion", "4"], 2, "there is no option --num-completion; did you mean --num-completions?"),
    (profile, ["--num-completions", "0"], 2, "--num-completions must be at least 1, got 0"),
    (profile, ["--temperature", "0"], 2, "--temperature must be above 0, as in training, got 0"),
    (profile, ["--show", "p.jsonl"], 3, "--show p.jsonl: there is no profile with a finished chunk"),
    (profile, ["--data", "aritmetic"], 3, "did you mean 'arithmetic'?"),
]


@pytest.mark.parametrize("module, args, code, text", BAD, ids=[" ".join(args) for _, args, _, _ in BAD])
def test_a_mistake_is_one_line_with_the_remedy(module, args, code, text, program, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    got, _, error = program(module, *args)
    lines = [line for line in error.splitlines() if line.startswith("fastrl: error: ")]
    assert got == code and len(lines) == 1 and text in lines[0], error
