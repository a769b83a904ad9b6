"""What fastrl's own source never does: run text as code, unpickle, call a shell, trust a model's code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("fastrl", "kernels", "bench") for p in (ROOT / folder).rglob("*.py"))
RULES = "S102,S301,S302,S306,S307,S310,S323,S501,S506,S602,S604,S605,S609"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "telnetlib"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "numpy.load",
    "np.load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "input",
}
# keyword -> the only value that may be written
KEYWORDS = dict(trust_remote_code=False, weights_only=True, allow_pickle=False, shell=False, use_safetensors=True)
# where a lint of security is switched off, and why that is right
NOQA = {
    "fastrl/base/log.py S603": "git of the PATH, constant arguments",
    "fastrl/rewards/workers.py S603": "the command is fastrl's own; answers travel through a pipe",
    "fastrl/data/arithmetic.py S311": "problems, not secrets",
    "fastrl/assets/make_tiny.py S311": "a training set, not secrets",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(path: Path) -> list[str]:
    """Forbidden imports, calls and arguments of a file, by line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        if isinstance(node, ast.Call):
            names += [dotted(node.func)] * (dotted(node.func) in CALLS)
            for word in node.keywords:
                right = isinstance(word.value, ast.Constant) and word.value.value is KEYWORDS.get(word.arg)
                names += [f"{word.arg}={ast.unparse(word.value)}"] * (word.arg in KEYWORDS and not right)
        for name in names:
            bad = isinstance(node, ast.Call) or name.partition(".")[0] in MODULES
            if bad or name.startswith("torch.distributed.checkpoint"):
                found.append(f"{path.name}:{node.lineno}: {name}")
    return found


@pytest.mark.promise("D1", trials=1)
def test_no_source_runs_text_or_unpickles():
    assert len(SOURCES) > 100
    assert [line for path in SOURCES for line in offences(path)] == []


PLANTED = {
    "import pickle": "pickle",
    "from yaml import load": "yaml.load",
    "import torch.distributed.checkpoint as dcp": "torch.distributed.checkpoint",
    "x = eval(y)": "eval",
    "exec(y)": "exec",
    "torch.load(f)": "torch.load",
    "AutoModel.from_pretrained(p, trust_remote_code=True)": "trust_remote_code=True",
    "AutoModel.from_pretrained(p, trust_remote_code=flag)": "trust_remote_code=flag",
    "torch.something(f, weights_only=False)": "weights_only=False",
    "subprocess.run(c, shell=True)": "shell=True",
    "os.system(c)": "os.system",
}


@pytest.mark.parametrize("line, name", PLANTED.items())
def test_a_planted_offence_is_found(tmp_path, line, name):
    (tmp_path / "planted.py").write_text(f"def f():\n    {line}\n")
    assert offences(tmp_path / "planted.py") == [f"planted.py:2: {name}"]


def ruff(*paths: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--select", RULES, "--no-cache"]
    done = subprocess.run([*command, "--output-format", "concise", *map(str, paths)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.promise("D1", trials=1)
def test_the_linter_of_security_finds_nothing_and_would_find_something(tmp_path):
    assert ruff(ROOT / "fastrl", ROOT / "kernels", ROOT / "bench") == (0, "All checks passed!\n")
    (tmp_path / "planted.py").write_text("import pickle\npickle.loads(x)\nsubprocess.run(x, shell=True)\neval(x)\n")
    code, said = ruff(tmp_path)
    assert code == 1 and {"S301", "S604", "S307"} <= set(re.findall(r"S\d+", said))


@pytest.mark.promise("D1", trials=1)
def test_every_lint_of_security_that_is_switched_off_has_its_reason_here():
    found = set()
    for path in SOURCES:
        for line in path.read_text().splitlines():
            if rules := re.search(r"#\s*noqa:?\s*((?:S\d+(?:,\s*)?)+)", line):
                found.add(f"{path.relative_to(ROOT)} {rules[1].strip()}")
    assert found == set(NOQA)


def test_names_have_no_leading_underscore():
    """One convention: what a module does not offer is not imported; ctypes asks for `_fields_`."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "name", None) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name and re.match(r"_[A-Za-z]", name) and name != "_fields_":
                found.add(f"{path.relative_to(ROOT)}: {name}")
    assert found == set()
