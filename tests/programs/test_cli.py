"""What a user sees who types something wrong: one line with the remedy, exit code 2 or 3, no traceback."""

import json
import shutil
import sys

import pytest

from fastrl import evaluate, train
from fastrl.base.exits import run_program
from fastrl.models.loading import model_path


@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
    """Run main() of a program the way `python -m` does -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["fastrl", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            run_program(module.main)
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return run


@pytest.fixture
def no_tokenizer(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_path("embedded"), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


BAD = [
    (["--lrr", "1e-4"], 2, "there is no option --lrr; did you mean --optim.lr?"),
    (["--num_generations", "4"], 2, "there is no option --num_generations; here it is called --group-size"),
    (["--update", "gxpo", "--update.stopped"], 2, "there is no option --update.stopped"),
    (["--allocation.position", "5"], 2, "there is no option --allocation.position"),
    (["--lr", "-1e-4"], 2, "--optim.lr must be between 0 and 1, got -0.0001; 1e-6 is usual"),
    (["--steps", "many"], 2, "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
    (["--objective", "grop"], 2, "--objective grop: no such member; did you mean grpo?; there are: grpo"),
    (["--group-size", "1"], 2, "GRPO compares at least 2 completions of a problem, but --allocation may sample 1"),
    (["--group-size", "0"], 2, "--allocation.group-size must be at least 1, got 0"),
    (["--minibatches", "99"], 2, "--minibatches 99 cannot be cut from --problems-per-step 32"),
    (["--clip-low", "0"], 2, "--objective.clip-low must be above 0, got 0"),
    (["--dual-clip", "0.5"], 2, "--objective.dual-clip must be above 1"),
    (["--name", "../up"], 2, "--name must be 1 to 100 letters, digits"),
    (["--log", "wandbb"], 2, "--log wandbb: there is tensorboard and wandb"),
    (["--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
    (["--data", "aritmetic"], 3, "did you mean 'arithmetic'?"),
    (["--model", "./nowhere"], 2, "--model ./nowhere: no such folder"),
    (["--reward", "maths"], 2, "did you mean 'math'?"),
    (["--reward", "nowhere.py:f"], 2, "nowhere.py"),
    (["--max-new-tokens", "0"], 2, "--max-new-tokens must be at least 1, got 0"),
    (["--device", "cuda"], 2, "torch sees no CUDA device"),
    (["--max-prompt-tokens", "3"], 3, "--max-prompt-tokens is 3; raise it"),
    (["--temperature", "0"], 2, "--temperature must be above 0 in training"),
    (["--stop-at-accuracy", "85", "--eval-every", "5"], 2, "--stop-at-accuracy must be at most 1, got 85.0"),
    (["--stop-below-accuracy", "-1"], 2, "--stop-below-accuracy must be at least 0, got -1.0"),
    (["--stop-below-accuracy", "0.2"], 2, "--stop-below-accuracy looks at evaluations: say of what by --eval"),
    (["--stop-at-accuracy", "0.5", "--stop-below-accuracy", "0.6"], 2, "0.6 must be below --stop-at-accuracy 0.5"),
    (["--stop-at-accuracy", "0.85"], 2, "say of what by --eval, how often by --eval-every"),
    (["--resume", "runs/other/checkpoints/step-3"], 6, "no MANIFEST.json, so this is not a complete checkpoint"),
    (["nowhere.toml"], 2, "nowhere.toml: no such recipe"),
    (["--objective"], 2, "--objective needs a name; there are: grpo"),
    (["--data", "arithmetic", "--split", "dev"], 3, "arithmetic has the splits train and test, got 'dev'"),
]


@pytest.mark.parametrize("args, code, text", BAD, ids=[" ".join(a) for a, _, _ in BAD])
def test_a_mistake_is_one_line_with_the_remedy(args, code, text, program):
    got, _, stderr = program(train, *args)
    assert got == code
    lines = [line for line in stderr.splitlines() if line.startswith("fastrl: error: ")]
    assert len(lines) == 1 and text in lines[0], stderr
    assert "Traceback" not in stderr


MEANT = {
    "--lrr": "--optim.lr",
    "--optim.lrr": "--optim.lr",
    "--optm.lr": "--optim.lr",
    "--stps": "--steps",
    "--max-tokens": "--max-new-tokens",
    "--task.max-new-tokens": "--max-new-tokens",
    "--save-evry": "--save-every",
    "--grp-size": "--allocation.group-size",
    "--rewrad": "--reward",
    "--critic.optim.rl": "--critic.optim.lr",
    "--lookahed": "",
    "--update.watch.seen": "",
    "--allocation.position": "",
    "--allocation.best-reward": "",
    "--batch-size": "",
    "--num-epochs": "",
    "--fp16": "",
    "--use-vllm": "",
    "--wandb-project": "",
    "--deepspeed": "",
    "--top-k": "",
    "--update.alpha": "",
    "--ppo-epochs": "",
    "--lora-rank": "",
    "--gpu-memory-utilization": "",
}


@pytest.mark.parametrize("typed", MEANT)
def test_what_is_close_is_suggested_and_nothing_else(typed):
    with pytest.raises(ValueError) as error:
        train.configure([typed, "1"])
    hint = f"; did you mean {MEANT[typed]}?" if MEANT[typed] else "; see --help"
    assert str(error.value) == f"the command line: there is no option {typed}{hint}"


def test_a_recipe_that_is_not_there_is_not_any_other(program, tmp_path):
    (tmp_path / "mine.toml").write_text("steps = 1\n")
    assert program(train, "nowhere.toml")[2] == "fastrl: error: nowhere.toml: no such recipe\n"
    assert program(train, "mime.toml")[2] == "fastrl: error: mime.toml: no such recipe; did you mean mine.toml?\n"


def test_a_model_folder_without_tokenizer(program, no_tokenizer):
    code, _, stderr = program(train, "--model", no_tokenizer, "--data", "arithmetic")
    assert code == 2 and "the folder has no tokenizer" in stderr and "Traceback" not in stderr


@pytest.mark.promise("D4", trials=1)
def test_broken_rows_are_listed_and_too_many_end_the_run(program, tmp_path):
    good = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(9)]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join([*good * 4, "{not json"]) + "\n")
    code, out, _ = program(
        train,
        "--data",
        few,
        "--reward",
        "exact",
        "--instruction",
        "",
        "--steps",
        "1",
        "--problems-per-step",
        "2",
        "--eval-limit",
        "4",
    )
    assert code == 0 and "dropped 1 rows that cannot be used: few.jsonl:37" in out
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join([*good, '{"prompt": "1+1="}', "[]"]) + "\n")
    code, _, stderr = program(train, "--data", many, "--reward", "exact")
    assert code == 3 and "many.jsonl:10" in stderr and "Traceback" not in stderr


def test_a_tokenizer_that_drops_the_text_is_refused(program, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"prompt": "What is 6 times 7?", "answer": "42"}\n')
    code, _, stderr = program(train, "--data", tmp_path / "words.jsonl", "--reward", "exact", "--instruction", "")
    assert code == 3 and "the tokenizer of --model has no tokens for '?Waehimst'" in stderr


def test_a_recipe_with_a_misspelt_key(program, tmp_path):
    (tmp_path / "r.toml").write_text("steps = 3\n[optim]\nlearning_rte = 1e-3\n")
    code, _, stderr = program(train, "r.toml")
    assert code == 2 and "r.toml: there is no key 'optim.learning_rte'" in stderr
    (tmp_path / "r.toml").write_text("[optim]\nlr = 'fast'\n")
    code, _, stderr = program(train, "r.toml")
    assert code == 2 and stderr.startswith("fastrl: error: r.toml: ") and "--optim.lr" in stderr
    (tmp_path / "r.toml").write_text("steps = \n")
    assert program(train, "r.toml")[0] == 2


def test_dry_run_prints_the_resolved_configuration_and_starts_nothing(program, tmp_path):
    (tmp_path / "r.toml").write_text(
        "steps = 7\ndata = 'arithmetic'\n[objective]\ntype = 'grpo'\nclip_high = 0.28\n[optim]\nbetas = [0.5, 0.6]\n"
    )
    code, out, _ = program(train, "r.toml", "--dry-run", "--lr", "3e-4", "--reward", "exact", "--reward", "math:0.5")
    assert code == 0 and not (tmp_path / "runs").exists()
    shown = json.loads(out[: out.index("\nfastrl ")])
    assert (
        shown["run"]["steps"] == 7 and shown["objective"]["clip_high"] == 0.28 and shown["optim"]["betas"] == [0.5, 0.6]
    )
    assert shown["optim"]["lr"] == 3e-4 and shown["reward"] == ["exact", "math:0.5"]
    assert "objective: grpo" in out and "clip_high=0.28" in out and "memory: planned" in out
    assert "data: arithmetic (train): 8192 problems" in out and "first prompt, 12 tokens: 1*4*9*5-6-2=" in out


def test_evaluate_says_what_is_wrong(program):
    code, _, stderr = program(evaluate, "--modle", "x")
    assert code == 2 and "there is no option --modle; did you mean --model?" in stderr
    code, _, stderr = program(evaluate, "--top-p", "0")
    assert code == 2 and "--top-p must be above 0, got 0" in stderr


def test_evaluate_scores_the_embedded_model(program):
    code, out, _ = program(
        evaluate,
        "--data",
        "arithmetic",
        "--limit",
        "16",
        "--k",
        "4",
        "--max-new-tokens",
        "10",
        "--max-prompt-tokens",
        "32",
        "--out",
        "scores.json",
    )
    assert code == 0
    scores = json.loads(out.splitlines()[-1])
    assert scores == json.loads(open("scores.json").read())
    assert scores["num_problems"] == 16 and scores["protocol"]["k"] == 4
    # pass@1 is the same estimate as avg@k; more draws can only help
    assert (
        scores["pass@1"] == pytest.approx(scores["avg@4"])
        and 0.1 < scores["pass@1"] <= scores["pass@2"] <= scores["pass@4"]
    )
    assert scores["avg@4/ci95_low"] < scores["avg@4"] < scores["avg@4/ci95_high"]


def test_a_run_that_never_begins_leaves_the_earlier_one_alone(program, tmp_path):
    folder = tmp_path / "runs" / "default"
    code, _, _ = program(train, "--data", "nowhere.jsonl", "--reward", "exact")
    assert code == 3 and json.loads((folder / "status.json").read_text())["exit_code"] == 3
    assert program(train, "--steps", "1", "--problems-per-step", "2", "--eval-limit", "2")[0] == 0
    before = (folder / "status.json").read_text(), (folder / "metrics.jsonl").read_text()
    assert program(train, "--data", "nowhere.jsonl", "--reward", "exact")[0] == 3
    assert ((folder / "status.json").read_text(), (folder / "metrics.jsonl").read_text()) == before
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["default"]


def test_a_tokenizer_larger_than_the_model_is_refused(program, tmp_path):
    shutil.copytree(model_path("embedded"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 12}))
    code, _, stderr = program(train, "--model", tmp_path / "model", "--data", "arithmetic", "--steps", "1")
    assert code == 2 and "its tokenizer writes id 14, but the model has 12 tokens" in stderr


def test_texts_longer_than_the_model_was_made_for_are_warned_of(program):
    code, out, _ = program(
        train, "--steps", "1", "--problems-per-step", "2", "--eval-limit", "2", "--max-new-tokens", "60"
    )
    assert code == 0 and "warning: prompts and completions reach 78 tokens, but the model was made for 64" in out
