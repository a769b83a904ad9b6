"""What docs/reliability.md promises, counted: a test marked `promise("A5", trials=20)` is 20 trials of A5.

python -m pytest -m "" --promise A5 --promise B3     the tests of some promises, the long ones of `make soak` too
python -m pytest -m promise --reliability=FILE       writes [{id, run, passed, command, seconds}], and keeps what
                                                     FILE says of the promises that were not run;
                                                     --reliability-add adds to what it says of those that were.
                                                     After a blank, pytest would take a FILE that exists for tests
python tests/support/promises.py                     brings the counts of bench/results/reliability.json into the
                                                     tables of docs/reliability.md
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS, DOC = ROOT / "bench" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?P<id>[A-E]\d+) \|(?P<what>.*)\|(?P<count>[^|]*)\|$", re.MULTILINE | re.ASCII)


def counted() -> list[dict]:
    """What was counted last; nothing where there is no file of it."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def rendered(doc: str, results: list[dict]) -> str:
    """The document with `passed/run` of every promise in the last column of its row, `-` where none was counted."""
    counts = {row["id"]: f"{row['passed']}/{row['run']}" for row in results}
    return ROW.sub(lambda m: f"| {m['id']} |{m['what']}| {counts.get(m['id'], '-')} |", doc)


def record(file: Path, counts: dict[str, dict], *, add: bool = False) -> None:
    """Write {id: {run, passed, seconds, command}} into the list of `file`, in place of what it says of these ids.

    With `add` the numbers are added to those it has. What it says of other ids stays.
    """
    known = {row["id"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    for promise, new in counts.items():
        before = known.get(promise, {}) if add else {}
        sums = {name: before.get(name, 0) + new[name] for name in ("run", "passed", "seconds")}
        known[promise] = {"id": promise, **new, **sums, "seconds": round(sums["seconds"], 1)}
    rows = [known[name] for name in sorted(known, key=order)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def order(promise: str) -> tuple[str, int]:
    return promise[0], int(promise[1:])


class Promises:
    """A pytest plugin; with xdist the reports reach it in the process that started the others."""

    def __init__(self, file: str | None, add: bool, wanted: list[str]):
        self.file, self.add, self.wanted = file, add, set(wanted)
        self.counts = defaultdict(lambda: {"run": 0, "passed": 0, "seconds": 0.0})

    def pytest_collection_modifyitems(self, config, items):
        for item in items:
            for mark in item.iter_markers("promise"):
                item.user_properties.append(("promise", [mark.args[0], mark.kwargs.get("trials", 1)]))
        if self.wanted:
            chosen = [i for i in items if self.wanted & {m.args[0] for m in i.iter_markers("promise")}]
            config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
            items[:] = chosen

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties:
            if name != "promise" or report.skipped:
                continue
            promise, trials = value
            counts = self.counts[promise]
            counts["seconds"] += report.duration
            if report.when == "call" or report.failed:
                counts["run"] += trials
                counts["passed"] += trials * report.passed

    def pytest_sessionfinish(self, session):
        if not self.file or hasattr(session.config, "workerinput"):
            return
        where = ", without and with vLLM" if self.add else ""
        counts = {
            promise: {**found, "command": f'python -m pytest -m "" --promise {promise}{where}'}
            for promise, found in self.counts.items()
            if found["run"]
        }
        record(Path(self.file), counts, add=self.add)


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--promise", action="append", default=[], help="only tests of this promise; may be repeated")
    parser.addoption("--reliability", help="write how many trials of each promise passed into this JSON file")
    parser.addoption("--reliability-add", action="store_true", help="add them to those that the file has")


def pytest_configure(config: pytest.Config):
    options = (config.getoption(name) for name in ("--reliability", "--reliability-add", "--promise"))
    config.pluginmanager.register(Promises(*options))


if __name__ == "__main__":
    DOC.write_text(rendered(DOC.read_text(), counted()))
