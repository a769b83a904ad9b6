"""A run's name stays in its folder, and its folder is its own."""

from pathlib import Path

import pytest

from fastrl.base.exits import exit_code
from fastrl.settings.run import configure

# the first six of the acceptance list, others beside them
NAMES = [
    "../x",
    "/etc/x",
    "a/b",
    "",
    "x" * 300,
    "..",
    ".",
    "...",
    "a b",
    "a\x00b",
    "a\n",
    "\u00e4",
    "a\\b",
    "~",
    "$HOME",
    "a:b",
    "x" * 101,
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.promise("D5", trials=1)
def test_a_name_that_is_no_plain_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        configure(["--name", name])
    assert exit_code(caught.value) == 2 and "--name" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "x" * 100, "..a", "2026-08.b_1", "-x"[1:]])
def test_plain_names_are_taken(name):
    assert configure(["--name", name]).run.folder == Path("runs") / name


@pytest.mark.parametrize(
    "out, said",
    [
        (".", "--out .: name a folder of the run's own"),
        ("..", "--out ..: name a folder"),
        ("/", "--out /: name"),
        ("a/..", "--out a/..: name a folder"),
        (str(Path.home()), "name a folder of the run's own"),
        ("file", "--out file: there is a file of this name"),
        ("file/deeper", "there is a file of this name"),
        ("x" * 300, "--out is too long"),
        ("a\x1b[2J", "--out has a control character"),
    ],
    ids=ascii,
)
def test_a_folder_that_cannot_be_the_runs_own_is_refused(out, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError) as caught:
        configure(["--out", out])
    assert exit_code(caught.value) == 2 and said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_elsewhere_is_the_users_choice(tmp_path):
    assert configure(["--out", str(tmp_path / "new" / "run")]).run.folder == tmp_path / "new" / "run"
