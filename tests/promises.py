"""What docs/reliability.md promises, counted: a test marked `promise("A5", trials=20)` is 20 trials of A5.

python -m pytest -m "" --promise A5 --promise B3     the tests of some promises, the long ones of `make soak` too
python -m pytest -m promise --reliability FILE       writes [{id, run, passed, command, seconds}], and keeps what
                                                     FILE says of the promises that were not run
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest


def order(promise: str) -> tuple[str, int]:
    return promise[0], int(promise[1:])


class Promises:
    """A pytest plugin; with xdist the reports reach it in the process that started the others."""

    def __init__(self, file: str | None, wanted: list[str]):
        self.file, self.wanted = file, set(wanted)
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
        path = Path(self.file)
        known = {row["id"]: row for row in json.loads(path.read_text())} if path.exists() else {}
        for promise, counts in self.counts.items():
            if not counts["run"]:
                continue
            command = f'python -m pytest -m "" --promise {promise}'
            known[promise] = {
                "id": promise, "run": counts["run"], "passed": counts["passed"], "command": command,
                "seconds": round(counts["seconds"], 1),
            }  # fmt: skip
        rows = [known[name] for name in sorted(known, key=order)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--promise", action="append", default=[], help="only tests of this promise; may be repeated")
    parser.addoption("--reliability", help="write how many trials of each promise passed into this JSON file")
