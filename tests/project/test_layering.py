"""Imports go strictly down, never within a layer; test files import no other test file, and lie in folders."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    {"kernels": "operations of the head and of losses: definitions and Triton (the folder `kernels/`)"},
    {"base": "types, errors, settings, ranks, log, spans, faults; imports torch and nothing of ours"},
    {
        "objectives": "what the policy is pushed towards",
        "allocation": "which problems, how many completions",
        "rewards": "verifiers and reward functions, in processes that can be killed",
        "weights": "the flat buffer, a rank's shard of it, optimizers, moves",
    },
    {
        "updates": "how a batch becomes a parameter change",
        "checkpoint": "writing, reading, cutting among ranks",
        "data": "problems, prompts, tasks",
        "watch": "collapse, hangs, refused steps, what the driver says of a card",
        "memory": "bytes: parts, plan, advice, measurement; knows no run",
    },
    {"models": "loading and refusing, the check at load, head, packing, policy, reference, critic"},
    {"engine": "samplers: hf and vLLM over the trainer's weights", "assets": "the embedded model"},
    {"settings": "every flag, by sections; TOML and command line"},
    {"step": "one step, in order"},
    {
        "passrates": "the profile: its file, how it is sampled", "comparison": "what `compare` runs and reports",
        "evaluate": "program", "plan": "program", "doctor": "program",
    },
    {"run": "from settings to a running trainer; resuming", "compare": "program", "profile": "program"},
    {"train": "program"},
]  # fmt: skip
DOC = ROOT / "docs" / "architecture.md"
TABLE = re.compile(r"(?<=<!-- packages -->\n).*?(?=<!-- end -->)", re.DOTALL)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def table() -> str:
    """The packages in rows of a document, lowest first."""
    rows = [f"| {level} | `{name}` | {holds} |" for level, units in enumerate(LAYERS) for name, holds in units.items()]
    return "\n".join(["| level | package | what it holds |", "|---|---|---|", *rows]) + "\n"


def unit(path: Path) -> str:
    """fastrl/rewards/math.py -> rewards; fastrl/train.py -> train."""
    return path.relative_to(ROOT / "fastrl").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Units of fastrl that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "fastrl" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("fastrl.")}
    return found - {"__version__"}


def violations(path: Path, own: str) -> list[str]:
    """Imports of units on the same or a higher layer, other than its own."""
    return [
        f"{path.name} ({own}, layer {LEVEL[own]}) imports {other} (layer {LEVEL[other]})"
        for other in sorted(imports(path) - {own})
        if LEVEL[other] >= LEVEL[own]
    ]


SOURCES = [p for p in sorted((ROOT / "fastrl").rglob("*.py")) if p.name != "__init__.py" or p.parent != ROOT / "fastrl"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    # make_tiny is a program: it may use whatever makes the model
    assert not violations(path, "train" if path.name == "make_tiny.py" else unit(path))


def test_every_unit_has_a_place_and_the_document_says_it():
    assert {unit(path) for path in SOURCES} | {"kernels"} == LEVEL.keys()
    assert TABLE.search(DOC.read_text())[0] == table(), "python tests/project/test_layering.py writes it"


def test_kernels_import_nothing_of_ours():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imports(path) - {"kernels"}


def test_a_planted_upward_import_is_found(tmp_path):
    planted = tmp_path / "flat.py"
    planted.write_text("def f():\n    from fastrl.step.trainer import Trainer\n    from fastrl import models\n")
    found = violations(planted, "weights")
    assert len(found) == 2 and "imports step (layer 7)" in found[1] and "imports models (layer 4)" in found[0]


TESTS = sorted((ROOT / "tests").rglob("*.py"))
IN_A_TEXT = re.compile(r"\b(?:from|import)\s+(?:\w+\.)*(test_\w+)")  # scripts that tests write for other processes


def imported_tests(path: Path) -> list[str]:
    """Test files that a file imports, itself or in a text, each with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            parts = [part for name in names for part in name.split(".") if part.startswith("test_")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = IN_A_TEXT.findall(node.value)
        else:
            continue
        found += [f"{path.name}:{node.lineno}: {part}" for part in parts]
    return found


def test_no_test_file_imports_another():
    assert len(TESTS) > 100
    assert [line for path in TESTS for line in imported_tests(path)] == []


PLANTED = '''
import {0}
def f():
    from engine.{0} import Broken
    from support import {0}
SCRIPT = """
import sys
from {0} import Broken, nan
    import engine.{0}
"""
TEXT = f"from {0} import {{f}}"
'''


def test_a_planted_import_of_a_test_file_is_found(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED.format("test_other"))
    lines = [2, 4, 5, 6, 6, 11]  # a text is where its first line is
    assert sorted(imported_tests(planted)) == sorted(f"planted.py:{line}: test_other" for line in lines)


def test_folders_of_tests_are_those_of_the_packages():
    """Names of test files differ, since pytest imports them by their name alone; so no folder has an __init__.py."""
    packages = {path.parent.name for path in (ROOT / "fastrl").glob("*/__init__.py")} - {"assets"}
    others = {"kernels", "pretend", "programs", "project", "support", "golden"}
    inside = [path.relative_to(ROOT / "tests") for path in TESTS if path.name != "conftest.py"]
    assert {path.parts[0] for path in inside} == packages | others
    names = [path.name for path in inside]
    assert len(set(names)) == len(names) and "__init__.py" not in names
    assert all((path.parts[0] in ("support", "golden")) != path.name.startswith("test_") for path in inside)


if __name__ == "__main__":
    DOC.write_text(TABLE.sub(lambda _: table(), DOC.read_text()))
