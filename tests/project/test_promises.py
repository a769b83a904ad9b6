"""The table of docs/reliability.md says what was counted, of every promise that tests are marked with."""

import json
import re
import subprocess
import sys

import pytest

from support.promises import DOC, ROOT, ROW, counted, rendered

TESTS = """
import pytest

@pytest.mark.promise("A1", trials=3)
def test_kept(): pass

@pytest.mark.parametrize("n", range(3))
@pytest.mark.promise("B2", trials=2)
def test_broken_once(n): assert n

@pytest.mark.promise("A1")
def test_skipped(): pytest.skip("not here")

@pytest.mark.soak
@pytest.mark.promise("C3")
def test_long(): pass

def test_promises_nothing(): pass
"""


@pytest.fixture
def count(tmp_path):
    """Run pytest over TESTS -> what it has written, by id."""
    (tmp_path / "test_planted.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["support.promises"]')

    def run(*args: str) -> dict[str, tuple[int, int]]:
        file = tmp_path / "counted.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(tmp_path),
            "-p",
            "no:cacheprovider",
            "--reliability",
            str(file),
            *args,
            str(tmp_path),
        ]
        subprocess.run(command, capture_output=True, cwd=tmp_path)
        return {row["id"]: (row["passed"], row["run"]) for row in json.loads(file.read_text())}

    return run


def test_trials_are_counted_by_promise(count):
    assert count("-m", "promise and not soak") == {"A1": (3, 3), "B2": (4, 6)}
    assert count("-m", "", "--promise", "C3", "-n", "2") == {
        "A1": (3, 3),
        "B2": (4, 6),
        "C3": (1, 1),
    }  # others are kept
    assert count("-m", "", "--promise", "B2", "--reliability-add")["B2"] == (8, 12)


def test_the_document_says_what_was_counted():
    assert rendered(DOC.read_text(), counted()) == DOC.read_text(), (
        "python tests/support/promises.py brings the counts into the document"
    )


def test_a_count_stands_in_the_row_of_its_promise():
    doc = "| id | promise | trials |\n|---|---|---|\n| A1 | a \\| b | 1/1 |\n| A10 | c | - |\nA1 | x |\n"
    found = rendered(doc, [{"id": "A10", "passed": 5, "run": 6}])
    assert found == doc.replace("1/1", "-").replace("| c | -", "| c | 5/6")


def test_every_promise_of_the_tests_has_a_row_in_the_document_and_was_counted():
    marks = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path.name != "test_promises.py":
            marks |= set(re.findall(r'promise\("([A-E]\d+)"', path.read_text()))
    promised = {m["id"] for m in ROW.finditer(DOC.read_text())}
    assert marks and marks <= promised, f"no row in docs/reliability.md: {sorted(marks - promised)}"
    missing = promised - {row["id"] for row in counted()}
    assert not missing, f"not in bench/results/reliability.json: {sorted(missing)}; make reliability counts them"
