"""Nothing that a model, a row, a file name or an error says can steer the terminal."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from fastrl import doctor, evaluate, profile, train
from fastrl.base.exits import run_program
from fastrl.base.log import printable
from fastrl.data.arithmetic import Arithmetic
from fastrl.models.loading import model_path

ROOT = Path(__file__).parents[2]
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def program(monkeypatch, tmp_path, capfd):
    """Run main() of a program the way `python -m` does -> (exit code, all that it wrote)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["fastrl", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            run_program(module.main)
        captured = capfd.readouterr()
        return exit.value.code, captured.out + captured.err

    return run


@pytest.fixture
def hostile(tmp_path):
    """A model that writes ESC for 7, and problems with it in a file whose name turns the terminal red."""
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(model_path("embedded"), model)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"7"', '"\\u011b"'))  # how a byte-level vocabulary writes 0x1b
    data.mkdir()
    rows = [
        {"prompt": p.prompt.replace("7", "\x1b"), "answer": p.answer.replace("7", "\x1b")}
        for p in Arithmetic().load("train")
        if "7" in p.prompt
    ][:40]
    lines = [json.dumps(row) for row in rows] + ['{"prompt": "\\u001b[2J", "answer": null}']
    (data / "train-\x1b[31mred.jsonl").write_text("\n".join(lines))
    return [
        "--model",
        model,
        "--data",
        data,
        "--split",
        "train",
        "--reward",
        "last_character",
        "--instruction",
        "",
        "--max-new-tokens",
        "10",
    ]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb\x08\x7f\0", "a\\rb\\x08\\x7f\\x00"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("line\n\ttab \u00e9\u4e2d", "line\n\ttab \u00e9\u4e2d"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@pytest.mark.promise("D9", trials=1)
def test_a_run_of_hostile_texts_writes_no_control_character(program, hostile):
    code, said = program(
        train, *hostile, "--steps", 2, "--problems-per-step", 4, "--sample-every", 1, "--rollouts-every", 1
    )
    assert code == 0 and said.count("  sample  ") == 2
    assert "train-\\x1b[31mred.jsonl:41: the answer is null" in said and "first prompt" in said
    assert STEERING.findall(said) == []
    assert "\\u001b" in Path("runs/default/rollouts/step_000002.jsonl").read_text()


@pytest.mark.promise("D9", trials=1)
def test_the_other_programs_write_none_either(program, hostile):
    for module, args in ((evaluate, ["--limit", 4, "--k", 2]), (profile, ["--limit", 4, "--num-completions", 2])):
        code, said = program(module, *hostile, *args)
        assert code == 0 and "train-\\x1b[31mred.jsonl" in said, said
        assert STEERING.findall(said) == []
    code, said = program(doctor, *hostile[:2])
    assert code == 0 and STEERING.findall(said) == []


@pytest.mark.promise("D9", trials=1)
def test_errors_and_tracebacks_write_none(program, hostile, tmp_path):
    (tmp_path / "f.py").write_text(
        "def refuses(completions): raise ValueError('\\x1b]0;mine\\x07')\n"
        "def sometimes(completions): return [1.0 / (len(completions) == 1 and '3' not in c) for c in completions]\n"
    )
    short = ["--steps", 1, "--problems-per-step", 4]
    code, said = program(train, *hostile, *short, "--reward", f"{tmp_path}/f.py:refuses")
    assert code == 2 and "raised ValueError: \\x1b]0;mine\\x07 on every one" in said and STEERING.findall(said) == []
    assert STEERING.findall((tmp_path / "runs/default/traceback.txt").read_text()) == []
    code, said = program(train, "--data", "no\x1b[2Jwhere.jsonl")
    assert code == 2 and STEERING.findall(said) == []
    code, said = program(train, "--objective", "\x1b[2J")
    assert code == 2 and "\\x1b[2J" in said and STEERING.findall(said) == []


def test_a_bug_keeps_its_traceback_and_writes_none(program):
    class Broken:
        @staticmethod
        def main(argv):
            raise KeyError("\x1b[2J") from OSError("\x9b31m\x07")

    code, said = program(Broken)
    assert code == 1 and "Traceback" in said and "\\x9b31m\\x07" in said and STEERING.findall(said) == []


def test_every_program_prints_through_one_door():
    """print() of a text that was not made safe would be a way around it."""
    found = []
    for path in sorted((ROOT / "fastrl").rglob("*.py")):
        for line in path.read_text().splitlines():
            if re.search(r"\bprint\(", line) and not re.search(
                r"print\((printable|json\.dumps|f\"fastrl: error)", line
            ):
                found.append(f"{path.name}: {line.strip()}")
    rank = 'microbatches.py: print(f"rank {ranks.rank()}: {text}", file=sys.stderr, flush=True)'
    made = [line for line in found if line.startswith("make_tiny.py: ")]
    assert set(found) - set(made) == {rank}
