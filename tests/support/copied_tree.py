"""A copy of this checkout that is imported instead of it, and recipes of the documents applied to it."""

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page: str) -> dict[str, str]:
    """The parts of a document by their headings."""
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def edits(section: str) -> dict[str, tuple[str, str]]:
    """{path: (kind, text)} of a recipe's blocks: `python` is a whole new file, `diff` changes one."""
    found = {}
    for kind, text in BLOCK.findall(section):
        first, _, rest = text.partition("\n")
        path = first.removeprefix("# ")
        if kind == "python" and first.startswith("# ") and path.endswith(".py"):
            found[path] = (kind, rest)
        elif kind == "diff":
            found[path] = (kind, rest)
    return found


def apply(tree: Path, path: str, kind: str, text: str) -> None:
    """Write a new file, or change one as a diff says; what it takes away or stands beside must be there, once."""
    file = tree / path
    if kind == "python":
        assert not file.exists(), f"{path} is there already"
        file.write_text(text)
        return
    for hunk in hunks(text):
        before = "".join(line[1:] for line in hunk if line[0] in " -")
        after = "".join(line[1:] for line in hunk if line[0] in " +")
        assert file.read_text().count(before) == 1, f"{path} does not hold, once:\n{before}"
        file.write_text(file.read_text().replace(before, after))


def hunks(text: str) -> list[list[str]]:
    """Lines of a diff, in pieces that stand together in the file: an empty line parts them."""
    pieces = [piece.splitlines(keepends=True) for piece in re.split(r"^\n", text, flags=re.MULTILINE)]
    return [piece for piece in pieces if piece]


def copy(folder: Path) -> Path:
    """This checkout in `folder`, with a Python beside it that imports the copy and this environment's packages."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "runs")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in ("kernels", "csrc"):  # as the package has them
        (tree / "fastrl" / name).symlink_to(tree / name)
    venv.create(folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # a path in a .pth is no site folder: what lies in it, such as an editable install's hook, is not run
    (site / "copy.pth").write_text(f"{tree}\n{sysconfig.get_paths()['purelib']}\n")
    return tree


def python(tree: Path, *args: object, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the copy."""
    command = [tree.parent / "venv" / "bin" / "python", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=timeout)
