"""Versions with known holes are refused before anything is read; the doctor says what would fail."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from fastrl import doctor
from fastrl.base.versions import check_versions, installed, lowest, release

ROOT = Path(__file__).parents[2]
SAFE = {"torch": "2.10", "transformers": "5.0", "safetensors": "0.8", "vllm": "0.18"}  # docs/reliability.md, D3


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("2.13.0+cpu", (2, 13)),
        ("5.0rc1", (5,)),
        ("0.26", (0, 26)),
        ("2.10.1", (2, 10, 1)),
        ("2.9.dev1", (2, 9)),
        ("dev", ()),
    ],
)
def test_release(text, numbers):
    assert release(text) == numbers


def test_the_package_asks_for_no_version_with_a_known_hole():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = lowest([*project["dependencies"], *project["optional-dependencies"]["vllm"]])
    assert {name: release(asked[name]) >= release(least) for name, least in SAFE.items()} == dict.fromkeys(SAFE, True)
    assert lowest(["a>=1", "torch<3,>=2.10 ; extra == 'x'", "vllm[cpu]==0.26.1", "safetensors"]) == {
        "torch": "2.10",
        "vllm": "0.26.1",
    }


@pytest.mark.promise("D3", trials=1)
def test_an_old_version_is_refused_with_the_command_that_helps():
    found = check_versions()
    assert found["torch"][1] == "2.10" and release(found["torch"][0]) >= (2, 10)
    old = {"torch": "2.9.1+cu128", "transformers": "4.57.0"}
    with pytest.raises(ValueError) as caught:
        check_versions(lambda name: old.get(name, installed(name)))
    assert str(caught.value).startswith("torch 2.9.1+cu128 is installed and 2.10 is the lowest, transformers 4.57.0 is")
    assert re.search(r"run `pip install -U 'torch>=2.10' 'transformers>=5\.\d+'`", str(caught.value))
    assert check_versions(lambda name: None if name == "vllm" else installed(name))["vllm"][0] is None
    # a build of one's own, whose version says nothing, is tried
    assert check_versions(lambda name: "dev" if name == "torch" else installed(name))["torch"][0] == "dev"


def test_a_checkout_that_is_not_installed_has_no_bounds_to_check(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fastrl.base.versions.requires", requires)
    assert check_versions(lambda name: "0.1") == {}


def test_one_screen_for_a_machine_on_which_a_run_works(capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "fine" and len(lines) <= 24 and not any("FAILS" in line for line in lines)
    said = "\n".join(lines)
    # 4 layers of 201,344 parameters, embeddings of 2,048 and a norm of 128: weights, master and moments in float32
    assert "a checkpoint takes 12.3 MiB, and 3 lie there at once" in said
    assert "math answers, and outlives an answer without end" in said
    assert "16 tokens, end '<|endoftext|>' 0, padding '<|endoftext|>' 0, no chat template" in said
    assert "a prompt, 4 tokens: 1+1=" in said


def test_what_would_fail_is_said_and_the_rest_still_looked_at(tmp_path, capsys):
    code = doctor.main(["--model", str(tmp_path / "none"), "--keep", "1000000", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 2 and said.endswith("a run would fail\n")
    assert len(re.findall("FAILS: --model .*: no such folder", said)) == 2 and "math answers" in said
    with pytest.raises(ValueError, match=rf" free at {tmp_path}; a checkpoint takes 12.3 MiB, .* make room"):
        doctor.disk(doctor.DoctorConfig(keep=1000000, out=str(tmp_path / "not" / "yet")))
    with pytest.raises(ValueError, match="--keep must be at least 1, got 0"):
        doctor.main(["--keep", "0"])
