"""Imports go strictly down, never within a layer."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["kernels"],
    ["base", "memory"],
    ["objectives", "allocation", "rewards", "weights"],
    ["updates", "checkpoint", "data", "watch"],
    ["models"],
    ["engine", "assets"],
    ["settings"],
    ["step"],
    ["passrates", "comparison", "evaluate", "plan", "doctor"],
    ["run", "compare", "profile"],
    ["train"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


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


def test_kernels_import_nothing_of_ours():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imports(path) - {"kernels"}


def test_a_planted_upward_import_is_found(tmp_path):
    planted = tmp_path / "flat.py"
    planted.write_text("def f():\n    from fastrl.step.trainer import Trainer\n    from fastrl import models\n")
    found = violations(planted, "weights")
    assert len(found) == 2 and "imports step (layer 7)" in found[1] and "imports models (layer 4)" in found[0]
