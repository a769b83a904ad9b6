"""The examples of docs/extending.md: a member of an axis is one file and one line, and its test passes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from fastrl.allocation import ALLOCATORS
from fastrl.objectives import OBJECTIVES
from fastrl.updates import UPDATES
from support.trainers import make_trainer

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCKS = {m[1]: m[0] for m in re.finditer(r"(?<=```python\n)# (\S+\.py)\n.*?(?=```)", PAGE, re.S)}
# of an axis: the file of a member and that of its test
MEMBERS = [
    ("objective", OBJECTIVES, "Reinforce", "objectives/reinforce.py", "objectives/test_reinforce.py"),
    ("update", UPDATES, "Halves", "updates/halves.py", "updates/test_half_steps.py"),
    ("allocation", ALLOCATORS, "ShortFirst", "allocation/short_first.py", "allocation/test_short_first.py"),
]


def load(name, source, folder):
    """Import a code block under a module name."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("axis, registry, member, file, test", MEMBERS, ids=[m[0] for m in MEMBERS])
def test_a_member_is_one_file_and_one_line(axis, registry, member, file, test, tmp_path, monkeypatch):
    name = Path(file).stem
    module = load(f"fastrl/{file}".removesuffix(".py").replace("/", "."), BLOCKS[f"fastrl/{file}"], tmp_path)
    monkeypatch.setitem(registry, name, getattr(module, member))
    trainer = make_trainer(
        tmp_path / "run", f"--{axis}", name, "--problems-per-step", 4, "--limit", 16, "--eval-limit", 2, "--seed", 1
    )
    before = trainer.learner.policy.master.clone()
    metrics = trainer.step()
    assert metrics["grad_norm"] > 0 and not before.equal(trainer.learner.policy.master)
    tests = load(f"documented_{name}", BLOCKS[f"tests/{test}"], tmp_path)
    own = [function for key, function in vars(tests).items() if key.startswith("test_")]
    assert own
    for function in own:
        function()
